"""Entry point of `python -m metagmvae`: the command line."""

from metagmvae.infra.cli import main

raise SystemExit(main())
