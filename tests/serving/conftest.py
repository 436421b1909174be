import live
import pytest


@pytest.fixture(scope="session")
def genuine_checkpoint():
    folder = live.DATA / "tiny-llama-checkpoint"
    if not folder.is_dir():
        pytest.skip("the genuine tiny Llama checkpoint is not here (../shared/data/tiny-llama-checkpoint)")
    return folder
