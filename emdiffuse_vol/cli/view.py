"""`emdvol view`: an output in neuroglancer, beside its input."""

from __future__ import annotations

from pathlib import Path

import click

from emdiffuse_vol.cli.report import place


@click.command()
@click.argument("output", metavar="ISO.zarr", type=click.Path(path_type=Path))
@click.option(
    "--with", "input", metavar="INPUT", help="Input to show: an OME-Zarr or its URL.  [default: that of the run]"
)
@click.option(
    "--at", metavar="Z,Y,X", callback=place, help="Voxel of ISO.zarr in the middle.  [default: near its middle]"
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.12,
    show_default=True,
    help="Where the slider of the uncertainty stands at first; greys from 0 to 1.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65534),
    default=0,
    show_default="free ones",
    help="Port of the viewer; the volumes are served on the next one.",
)
@click.option("--link", metavar="BASE_URL", help="Print a link instead, for volumes that lie at BASE_URL/NAME.")
@click.option(
    "--screenshot", metavar="PNG", type=click.Path(path_type=Path, dir_okay=False), help="Draw a picture and end."
)
@click.option("--no-open", is_flag=True, help="Do not start a browser.")
def command(
    output: Path,
    input: str | None,
    at: tuple[int, int, int] | None,
    threshold: float,
    host: str,
    port: int,
    link: str | None,
    screenshot: Path | None,
    no_open: bool,
) -> None:
    """Show ISO.zarr in neuroglancer: input, reconstruction and uncertainty side by side, in one space.

    The volumes are served to this machine only, unless --host says otherwise, until Ctrl-C. Over SSH, forward two
    ports: ssh -L 8000:localhost:8000 -L 8001:localhost:8001, then --port 8000 --no-open.
    """
    from emdiffuse_vol.viewing import viewer
    from emdiffuse_vol.viewing.scene import link as link_of
    from emdiffuse_vol.viewing.serving import serving

    looked = viewer.look(output, input)
    if looked.missing:
        click.echo(looked.missing, err=True)
    if link is not None:
        if not link.startswith(("http://", "https://", "s3://", "gs://")):
            raise click.BadParameter(f"{link!r}: expected a URL such as https://HOST/FOLDER", param_hint="--link")
        urls = {name: f"{link.rstrip('/')}/{name}/" for name in looked.folders}
        click.echo(link_of(looked.state(urls, at, threshold)))
        return
    with serving(looked.folders, host, port + 1 if port else 0) as address:
        state = looked.state({name: address.url(name) for name in looked.folders}, at, threshold)
        with viewer.viewing(state, host, port) as opened:
            url = viewer.viewer_url(opened, host)
            if screenshot is not None:
                viewer.screenshot(opened, url, screenshot)
                click.echo(f"wrote {screenshot}")
                return
            click.echo(f"{url}\nThe volumes are on port {address.port}. Ctrl-C ends this.")
            if not no_open:
                click.launch(url)
            wait()


def wait() -> None:
    """Until Ctrl-C."""
    import threading

    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("")
