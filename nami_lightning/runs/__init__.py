"""A recipe, and the folder that a run of it makes.

- ``recipe``: one YAML file that describes a whole run: read, checked, made into objects.
- ``old_recipes``: class paths and keys of earlier versions, and their names now.
- ``run_dir``: the folder of a run: its checkpoints, and how they are read and written.
- ``tensorboard``: the logger that writes a run's TensorBoard events, and how they are read.
- ``loggers``: pictures and tables for any of Lightning's loggers, which may fail without ending a run.
- ``load``: a trained model from a run or from a pipeline's folder.
- ``export``: a run's model as files for diffusers, and by them a run as a start.
- ``lock``: one process at a time trains a run.
- ``preemption``: signals that ask a run to stop.
- ``rank_logs``: where each rank prints.
- ``rank_start``: rank 0 decides what all ranks start from.
"""
