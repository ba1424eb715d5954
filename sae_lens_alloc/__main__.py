"""`python -m sae_lens_alloc` is the console script `sae-lens-alloc`."""

from sae_lens_alloc_cli import main

main()
