"""What a run reads: its input, without the sections that are damaged.

Convention: ``Request.damaged`` is None, a list of sections such as "17,42-44" counted from 0, or "detect". From there
on, a volume is the stack of its good sections, and z counts these (see ``geometry.axial``).
"""

from __future__ import annotations

from emdiffuse_vol.geometry.axial import parse_sections
from emdiffuse_vol.reconstruct.job import Job
from emdiffuse_vol.stores.opening import open_volume
from emdiffuse_vol.stores.sections import without_sections
from emdiffuse_vol.stores.survey import damaged_sections
from emdiffuse_vol.stores.volume import Volume

DETECT = "detect"


def resolve_damaged(asked: str | None, volume: Volume) -> tuple[int, ...]:
    """Numbers of the damaged sections, rising. Raises ConfigError or GeometryError."""
    if asked is None:
        return ()
    if asked.strip() == DETECT:
        return damaged_sections(volume)
    return parse_sections(asked, volume.spec.shape[0])


def open_input(job: Job) -> Volume:
    """The one way to the voxels of a job."""
    return without_sections(open_volume(job.input, **job.input_options), job.damaged)
