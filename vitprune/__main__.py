"""`python -m vitprune`, which is how torchrun and accelerate launch start it, and `vitprune`."""

from vitprune.common.stopping import deferred


def main() -> None:
    """Run the command line; see `vitprune.cli.app.main`."""
    stopped = None
    try:
        with deferred():  # else Ctrl-C in the first half second is a traceback of imports
            import vitprune.cli.app
    except KeyboardInterrupt as error:
        stopped = error
    vitprune.cli.app.main(stopped=stopped)


if __name__ == "__main__":
    main()
