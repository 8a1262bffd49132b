"""Commands of `mimo`, a module each: `add_arguments(parser)` and `main(options) -> exit code`."""
