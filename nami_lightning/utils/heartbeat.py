"""A sign of life: what a process does now, and how many activities it has started."""

from dataclasses import dataclass


@dataclass
class Heartbeat:
    """What a process does now, for messages and for a watchdog.

    The watchdog sees from the count that the process makes progress.

    Attributes:
        activity: what the process does now, ``writing a checkpoint`` for example.
        count: number of activities that it has started.
    """

    activity: str = "getting ready"
    count: int = 0

    def beat(self, activity: str) -> None:
        """Record that an activity starts."""
        self.activity, self.count = activity, self.count + 1
