"""`vitprune push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitprune.cli.options import AsJson, option
from vitprune.cli.output import print_json, print_line, say
from vitprune.common import distributed
from vitprune.common.stopping import stopped_error
from vitprune.errors import HubError, UsageError

if TYPE_CHECKING:
    from vitprune.jobs.push import Target, Upload


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that sparsify wrote.", show_default=False)],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Model repository on the Hub.", show_default=False)
    ],
    private: Annotated[bool, option("Make a repository that nobody else can see.", "--private")] = False,
    yes: Annotated[bool, option("Do not ask before uploading.", "--yes", "-y")] = False,
    no_images: Annotated[bool, option("Draw report.html without the images of the data set.", "--no-images")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a complete run to the Hugging Face Hub, after asking: model, model card, report.

    model.safetensors, config.json, README.md, report.html and report.json go there in one commit, without any path of
    this machine. Afterwards hf-hub:OWNER/NAME is a MODEL for every command.

    Examples:

      vitprune push runs/deit_small_patch16_224-keep0.7 me/deit_small-keep0.7 --private

      vitprune push runs/deit_small_patch16_224-keep0.7 me/deit_small-keep0.7 --no-images --yes
    """
    distributed.refuse_several("push")

    from vitprune.jobs.push import look_up, prepare, upload

    prepared = prepare(run, repository, images=not no_images)
    if not yes and not (sys.stdin is not None and sys.stdin.isatty()):
        raise UsageError("push asks before it uploads, and there is no terminal to answer on", "add --yes")
    target = look_up(repository, private=private)
    _show(prepared, target, no_images)
    if not yes and not typer.confirm("Upload?", default=False, err=True):
        raise HubError("upload cancelled")
    try:
        commit = upload(prepared, target)
    except KeyboardInterrupt as error:
        raise stopped_error(error, f" during the upload; {target.url} shows whether it arrived", None) from error
    if as_json:
        print_json(
            {
                "repository": repository,
                "url": target.url,
                "commit_url": commit,
                "private": target.private,
                "created": not target.exists,
                "files": [{"name": name, "size_mib": size / 2**20} for name, size in prepared.sizes().items()],
                "num_images": prepared.num_images,
                "message": prepared.message,
            }
        )
        return
    print_line(f"uploaded to {target.url}")
    print_line(f"try it: vitprune eval hf-hub:{repository} DATA")


def _show(prepared: Upload, target: Target, no_images: bool) -> None:
    """What goes where, before the question."""
    who = "private" if target.private else "PUBLIC: everybody can see it"
    say(f"to {target.url} ({'exists' if target.exists else 'new'}, {who}), as {target.user}, in one commit:")
    for name, size in prepared.sizes().items():
        replaced = ", replaces the one there" if name in target.there else ""
        say(f"  {name}: {_size(size)}{replaced}")
    if prepared.num_images:
        count = f"{prepared.num_images} image{'s' * (prepared.num_images > 1)}"
        say(f"report.html shows {count} of your data set; --no-images leaves them out.")
    elif no_images and "report.html" in target.there:
        say("The report.html that is there remains in the history of the repository, with its images if it has any.")


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
