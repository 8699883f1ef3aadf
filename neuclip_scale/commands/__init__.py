"""One module per command; each has `main(argv: list[str]) -> int`, and `neuclip_scale.cli` knows them all."""
