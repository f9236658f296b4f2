"""A section of the report: a text, tables, pictures, and promises that were held or not."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Promise:
    """Something that is promised of a GPU, and what was measured.

    Attributes:
        name: what it is about.
        measured: the figure.
        goal: what it should be.
        held: None: it was not run.
    """

    name: str
    measured: str
    goal: str
    held: bool | None

    @property
    def verdict(self) -> str:
        """In words: ``held``, ``not held`` or ``not run``."""
        return {True: "held", False: "not held", None: "not run"}[self.held]

    @property
    def row(self) -> list[str]:
        """The cells of the report's table."""
        return [self.name, self.measured, self.goal, self.verdict]


def at_most(name: str, value: float, limit: float, form: str = "{:.2g}") -> Promise:
    """Return the promise that a value is at most a limit; NaN is not."""
    return Promise(name, form.format(value), f"at most {form.format(limit)}", value <= limit)


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: what a reader must know of the figures.
        tables: in Markdown, or in a fenced block.
        pictures: file names beside the report.
        promises: those of this section.
    """

    title: str
    text: str = ""
    tables: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
