"""MICrONS minnie65, mouse visual cortex, 8 x 8 x 40 nm: a region made isotropic, by one command.

python pipelines/microns.py FOLDER
python pipelines/microns.py FOLDER --centre 840000,400000,480000 --size 64,1024,1024 --executor local
"""

from __future__ import annotations

from public import PublicVolume, main

MICRONS = PublicVolume(
    name="MICrONS minnie65, mouse visual cortex, 8 x 8 x 40 nm (precomputed, jpeg, 117 TB)",
    # The same volume: s3://bossdb-open-data/... and gs://iarpa_microns/minnie/minnie65/em
    url="https://bossdb-open-data.s3.amazonaws.com/iarpa_microns/minnie/minnie65/em",
    page="https://www.microns-explorer.org/cortical-mm3",
    licence="CC BY 4.0 (https://www.microns-explorer.org/terms-and-conditions)",
    citation="MICrONS Consortium 2025, Nature 640:435, doi:10.1038/s41586-025-08790-w",
    centre="840000,400000,480000",
    config="vemdiffuse-a-microns-8x8x40.json",
)

if __name__ == "__main__":
    main(MICRONS)
