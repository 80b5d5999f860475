"""The program: process settings first, then the command line."""

from svdconvert.cli.process import (
    configure_garbage_collection,
    configure_libraries,
    configure_malloc_for_streaming,
    configure_streams,
)


def main() -> None:
    """The entry point, also of `python -m svdconvert`."""
    configure_garbage_collection()
    configure_streams()
    configure_libraries()
    configure_malloc_for_streaming()
    from svdconvert.cli.app import app

    app()


if __name__ == "__main__":
    main()
