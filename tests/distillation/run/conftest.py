"""A world whose epoch is an optimizer update of 32 images and a short one of 7: 39 training images have questions."""

import pytest


@pytest.fixture(scope="session")
def forty_rooms(tmp_path_factory):
    from dataset.miniature.world import ensure_world

    return ensure_world(tmp_path_factory.mktemp("data") / "world", train=40, val=9, test=2, workers=1)


@pytest.fixture
def places_of_forty(forty_rooms, tmp_path, monkeypatch):
    monkeypatch.setenv("ROOT_DATA_DIR", str(forty_rooms))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "out"))
    return tmp_path / "out"
