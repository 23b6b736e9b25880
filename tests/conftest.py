"What every test needs: the repository's root, a cache that lives as long as the checkout, and a small set of scenes."

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ.setdefault('SLOTNB_CACHE', str(ROOT / '.cache/slotnb'))
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
sys.path.insert(0, str(ROOT / 'tests'))  # tests/slow imports from here, runs of tests name parts here
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT / 'tests'), os.environ.get('PYTHONPATH')]))
DATA = ROOT / 'data/movi_a_subset'


def pytest_sessionstart(session):
    """Features of the committed scenes are computed once, before processes of pytest-xdist ask for them at the same
    time."""
    if hasattr(session.config, 'workerinput') or not session.config.getoption('numprocesses', None):
        return
    from slotnb.backbones import ViTBackbone
    from slotnb.data import KubricFolders
    from slotnb.features import extract

    torch.set_num_threads(os.cpu_count())  # the workers have not begun
    for split in ('train', 'test'):
        extract(ViTBackbone('dinov2_vits14'), KubricFolders(DATA, split), show_progress=False)


def pytest_collection_modifyitems(items):
    "Long tests first, so that no worker is left with one while the other has none."
    items.sort(key=lambda item: 'long' not in item.keywords)


def run_notebook(path):
    "Run a notebook as nbdev_test does, with modules found in the working directory first, as Jupyter finds them."
    from nbdev.test import test_nb

    before = sys.path[:]
    sys.path.insert(0, '')
    try:
        ok, _ = test_nb(path, basepath=ROOT, showerr=True)
    finally:
        sys.path[:] = before
    assert ok, f'{path.name} fails; see the traceback above'


@pytest.fixture(autouse=True)
def same_draws():
    "What a test draws without a seed of its own is the same in every run."
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def ctrl_c():
    """Ctrl-C interrupts this process and those that tests start. Shells let jobs in the background ignore it, and
    processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def copy_scenes(folder, **splits):
    "The first scenes of every split, so many of each; returns `folder`."
    for split, n in splits.items():
        for scene in sorted((DATA / split).glob('scene_*'))[:n]:
            shutil.copytree(scene, folder / split / scene.name)
    return folder


def finished_run(folder, save_dir, settings):
    "Configuration of a small run that is trained and scored; its scenes lie in `folder / 'data'`."
    from slotnb.evaluate import evaluate
    from slotnb.runs.config import TrainConfig
    from slotnb.train import fit

    copy_scenes(folder / 'data', train=6, test=2)
    config = TrainConfig(**settings, data_dir=str(folder / 'data'), save_dir=str(folder / save_dir))
    fit(config, False)
    evaluate(config.run_dir, False)
    return config


@pytest.fixture
def few_scenes(tmp_path):
    "A data_dir with eight training and two test scenes, to be damaged freely."
    return copy_scenes(tmp_path / 'data', train=8, test=2)


def find_chromium():
    """Chromium's path, installed if that can be done without asking; where it can't, the browser tests are skipped,
    but never by CI."""
    names = os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
    found = lambda: next((p for n in names if n and (p := shutil.which(n))), None)
    if not found() and shutil.which('apt-get') and os.geteuid() == 0:
        subprocess.run('apt-get update -qq && apt-get install -y -qq chromium', shell=True, stdout=subprocess.DEVNULL)
    if path := found():
        return path
    why = 'needs Chromium: install it (Debian: apt-get install chromium) or set CHROMIUM to its path'
    pytest.fail(why) if os.environ.get('CI') else pytest.skip(why)


@pytest.fixture(scope='module')
def browser():
    """A real Chromium, without a window. It ends with its module: while Playwright is there, no other event loop can
    run."""
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=find_chromium(), args=['--no-sandbox'] if os.geteuid() == 0 else []
        )
        yield chromium
        chromium.close()


def saved_bytes(f):
    "Bytes of the tensors that wait for the backward pass after `f`."
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(sizes.values())
