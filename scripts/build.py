"""make build / make push: builds the images that are due, or pushes all of them to IMAGE_PREFIX.

Changes: images and build cache of the engine; with --push the registry. Exit: 0 done, 1 failed,
3 refused and nothing changed, 4 a registry did not answer in time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stack import engine as engines
from stack import host, images, instance, preflight, settings
from stack.console import say
from stack.errors import run_main


def main(argv: Sequence[str]) -> int:
    """Builds, and pushes if asked to."""
    parser = argparse.ArgumentParser(prog="make build", description=__doc__)
    parser.add_argument("--push", action="store_true", help="push the images to IMAGE_PREFIX")
    parser.add_argument("--all", action="store_true", help="those of opt-in services that are off, too")
    arguments = parser.parse_args(argv)
    here = instance.current()
    chosen = settings.load(here.settings_file)
    found = host.read()
    preflight.raise_all(preflight.before_engine(found, chosen, here))
    running = engines.ensure(found, may_install=chosen.install_engine == "auto")
    every = images.tags(chosen)
    # Those who pull may have services on that are off here.
    wanted = every if arguments.all or arguments.push else images.needed(chosen, every)
    due = images.missing(chosen, wanted)
    preflight.check_engine_disk(running, to_build=len(due))
    if due:
        images.build(found, chosen, {image: wanted[image] for image in due})
    else:
        say("build: nothing to do, every image is current")
    if arguments.push:
        images.push(chosen, wanted)
    return 0


if __name__ == "__main__":
    run_main(main)
