"What every test needs: the repository's root, a cache that lives as long as the checkout, and a small set of scenes."
import os, shutil
from pathlib import Path
import pytest, torch

ROOT = Path(__file__).parent.parent
os.environ.setdefault('SLOTNB_CACHE', str(ROOT/'.cache/slotnb'))
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
DATA = ROOT/'data/movi_a_subset'


@pytest.fixture(autouse=True)
def same_draws():
    "What a test draws without a seed of its own is the same in every run."
    torch.manual_seed(0)


@pytest.fixture
def few_scenes(tmp_path):
    "A data_dir with eight training and two test scenes, to be damaged freely."
    for split, n in dict(train=8, test=2).items():
        for scene in sorted((DATA/split).glob('scene_*'))[:n]: shutil.copytree(scene, tmp_path/'data'/split/scene.name)
    return tmp_path/'data'
