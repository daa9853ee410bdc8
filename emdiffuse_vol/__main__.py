"""`python -m emdiffuse_vol` is `emdvol`."""

from emdiffuse_vol.cli.main import main

main(prog_name="emdvol")
