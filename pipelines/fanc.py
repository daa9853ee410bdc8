"""FANC, female adult nerve cord of Drosophila, 4.3 x 4.3 x 45 nm: a region made isotropic, by one command.

python pipelines/fanc.py FOLDER
python pipelines/fanc.py FOLDER --centre 55260,512483,173092 --size 32,512,512 --executor local
"""

from __future__ import annotations

from public import PublicVolume, main

FANC = PublicVolume(
    name="FANC, female adult nerve cord of Drosophila melanogaster, 4.3 x 4.3 x 45 nm (precomputed, jpeg)",
    # The fourth alignment, as neuroglancer shows it: gs://zetta_lee_fly_vnc_001_precomputed/fanc_v4_em
    url="https://storage.googleapis.com/zetta_lee_fly_vnc_001_precomputed/fanc_v4_em",
    page="https://github.com/htem/FANC_auto_recon",
    licence="CC BY 4.0 for the copy in BossDB (https://bossdb.org/project/phelps_hildebrand_graham2021); "
    "this bucket states none: ask the authors before publishing the data themselves",
    citation="Phelps, Hildebrand, Graham et al. 2021, Cell 184:759, doi:10.1016/j.cell.2020.12.013",
    centre="55260,512483,173092",
    config="vemdiffuse-a-fanc-4x4x45.json",
)

if __name__ == "__main__":
    main(FANC)
