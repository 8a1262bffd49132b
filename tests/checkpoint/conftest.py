"""What several files of the checkpoint tests use: releases as Xiaomi's, written once for a file."""

import pytest
from xiaomi_writer import Writer


@pytest.fixture(scope="module")
def files(tmp_path_factory, module_rng):
    """Writes a release once for all tests that only read it: its directory and what was written."""
    made = {}

    def make(release: str):
        if release not in made:
            folder = tmp_path_factory.mktemp("released") / release
            writer = Writer(release, module_rng)
            made[release] = (folder, writer, writer.write(folder))
        return made[release]

    return make
