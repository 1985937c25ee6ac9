"""Console script ``matquant``: the command line, or the sentence that names the extra it needs."""

import sys

from matquant.optional_packages import EXTRA_OF, missing_sentence


def main() -> None:
    """Run the command line; exit status 2 if packages for it are missing."""
    try:
        from matquant import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        print(f"error: {missing_sentence(package, 'The command line')}", file=sys.stderr)
        sys.exit(2)
    cli.main()
