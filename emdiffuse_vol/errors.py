"""Errors a user can cause. Each says what was found, what was expected and what to do, in one line.

    EmdvolError
    |-- InputError       a volume that cannot be read, or does not mean what it must
    |-- GeometryError    factor, block, shard, region or voxel size that do not fit each other
    |-- WeightsError     weights that are missing, damaged, or made for another network
    |-- OutputError      an output that exists, cannot be written, or belongs to another run
    |-- ConfigError      a configuration file or option that says nothing we know
    |-- BlockError       a block whose computation gave something that is not data, or blocks that were set aside
    |-- ClusterError     a scheduler, a job or a worker that cannot be had, or is not as asked
    `-- Stopped          a run that ended early by a signal, a walltime or a lack of workers, and can be continued

The command line prints the message and exits with status 1, as it does for errors of the operating system (a full
disk, a missing permission); with 75 (the system's "try again later") where the same command will go on. Anything else
that escapes is a bug.
"""

from __future__ import annotations


class EmdvolError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_status = 1


class InputError(EmdvolError):
    pass


class GeometryError(EmdvolError):
    pass


class WeightsError(EmdvolError):
    pass


class OutputError(EmdvolError):
    pass


class ConfigError(EmdvolError):
    pass


class BlockError(EmdvolError):
    pass


class ClusterError(EmdvolError):
    pass


class Stopped(EmdvolError):
    exit_status = 75
