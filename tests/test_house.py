"""The house: arrows between modules go one way, every module stands alone, notebooks and package agree, code is
formatted."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from conftest import ROOT

# a module may import those on its right, and no others
ALLOWED = {
    # core
    'core': '',
    'data': 'core',
    'backbones': 'backbone_specs core custom_backbone geometry layouts parts tokens weights',
    'features': 'backbones core data feature_shards processes',
    'processes': 'core',
    'normalizer': 'core geometry',
    'slot_attention': 'core',
    'decoder': 'core slot_attention',
    'losses': 'geometry',
    'model': 'core decoder geometry parts slot_attention variants.attention variants.decoders',
    'metrics': 'core',
    'refine': 'core',
    'baselines': 'core',
    'diagnostics': 'core geometry losses metrics normalizer',
    'train': 'core diagnostics fast.step features geometry losses model parts processes refine runs.batch_size '
    'runs.checkpoints runs.config '
    'runs.folder runs.identity runs.inputs runs.masks video.batches video.collapse video.losses video.model',
    'mask_head.affinities': 'core tokens',
    'mask_head.copy_paste': '',
    'mask_head.partition': 'core mask_head.affinities',
    'mask_head.head': 'core mask_head.affinities mask_head.copy_paste mask_head.partition refine runs.checkpoints '
    'runs.state',
    'mask_head.training': 'core data evaluate features geometry mask_head.head metrics model refine '
    'runs.checkpoints runs.identity runs.inputs runs.owner runs.scored runs.verify',
    'evaluate': 'runs.scored core data diagnostics features finer_grid geometry losses mask_head.head metrics model '
    'normalizer '
    'parts refine '
    'runs.checkpoints runs.config runs.identity runs.inputs runs.owner runs.shipped runs.state runs.verify '
    'formats.detect segment.result segment.segmenter train video.model video.score',
    'sweep': 'runs.scored backbones baselines core evaluate fast.many_models features metrics refine '
    'runs.config runs.executors '
    'runs.folder runs.identity runs.inputs runs.jobs runs.notebooks geometry runs.verify',
    # runs: what a run is made of
    'runs.config': 'core geometry model normalizer parts runs.loggers slot_attention video.model weights',
    'runs.loggers': 'core',
    'runs.batch_size': 'core runs.config',
    'runs.inputs': 'backbones core data features formats.detect geometry normalizer parts processes runs.checkpoints '
    'runs.config '
    'runs.identity video.batches video.clips',
    'runs.checkpoints': 'core model',
    'runs.owner': 'core',
    'runs.verify': 'core',
    'runs.scored': 'data runs.verify segment.result',
    'runs.notebooks': 'core runs.config runs.identity runs.owner',
    'runs.jobs': 'core runs.config runs.notebooks',
    'runs.executors': 'core runs.jobs',
    'runs.shipped': 'backbones core features runs.checkpoints runs.identity runs.verify',
    'runs.masks': 'core runs.checkpoints runs.identity runs.inputs',
    'runs.state': 'core runs.checkpoints',
    'runs.identity': 'core parts runs.config runs.owner',
    'runs.folder': 'core diagnostics model runs.checkpoints runs.config runs.identity runs.inputs runs.loggers '
    'runs.masks runs.owner runs.state video.collapse',
    'runs.extend': 'core parts runs.checkpoints runs.config runs.identity',
    # fast: the one door for speed
    'fast.blocks': 'core decoder',
    'fast.graphs': '',
    'fast.cpu': 'core decoder slot_attention',
    'fast.step': 'decoder fast.blocks fast.cpu fast.graphs losses model slot_attention',
    'fast.many_models': 'core diagnostics fast.graphs fast.step features losses model runs.config runs.folder '
    'runs.inputs runs.masks train',
    # variants
    'variants.attention': 'core slot_attention',
    'variants.decoders': 'core decoder slot_attention',
    # formats
    'formats.splits': 'core',
    'formats.masks': 'core data',
    'formats.folders': 'core formats.splits',
    'formats.images': 'core data formats.folders formats.masks formats.splits',
    'formats.panoptic': 'core data formats.masks',
    'formats.coco': 'core data formats.folders formats.images formats.masks formats.panoptic formats.splits',
    'formats.class_masks': 'core data formats.folders formats.images formats.masks formats.splits',
    'formats.shards': 'core data formats.masks formats.splits',
    'formats.video': 'core data formats.folders formats.splits',
    'formats.tfrecords': 'core',
    'formats.movi': 'core data formats.splits formats.tfrecords',
    'formats.detect': 'core data formats.class_masks formats.coco formats.folders formats.images formats.movi '
    'formats.multi_object formats.shards formats.splits formats.video',
    'formats.convert': 'core data formats.detect formats.shards plots runs.owner',
    'formats.multi_object': 'core data formats.masks formats.splits formats.tfrecords',
    # scenes
    'scenes.physics': 'core',
    'scenes.camera': 'scenes.physics',
    'scenes.floors': '',
    'scenes.plan': 'core scenes.camera scenes.floors scenes.physics',
    'scenes.lighting': 'scenes.camera scenes.floors scenes.physics scenes.plan',
    'scenes.kubric_files': 'core scenes.camera scenes.lighting scenes.physics scenes.plan',
    'scenes.render': 'core runs.owner scenes.kubric_files scenes.lighting scenes.physics scenes.plan',
    # segment
    'segment.files': 'core formats.masks plots',
    'segment.result': 'core formats.masks metrics plots refine segment.files',
    'segment.segmenter': 'backbones baselines core data features finer_grid geometry metrics refine segment.result',
    'segment.folder': 'core data plots runs.owner segment.files segment.result segment.segmenter',
    # video
    'video.clips': 'core data',
    'video.model': 'core model slot_attention',
    'video.losses': 'losses video.model',
    'video.collapse': 'losses video.model',
    'video.batches': 'core features video.clips',
    'video.score': 'core data features metrics model refine video.batches video.clips video.collapse video.identity '
    'video.metrics video.model',
    'video.metrics': 'core metrics',
    'video.identity': 'core metrics video.metrics',
    'video.strips': 'core plots',
    'video.link': 'core metrics model refine slot_attention video.metrics',
    # explorer
    'explorer.state': 'core data formats.detect normalizer runs.checkpoints runs.config runs.inputs',
    'explorer.viewer': 'runs.scored core data evaluate explorer.state features geometry metrics model normalizer parts '
    'plots '
    'refine runs.inputs runs.shipped segment.result',
    'explorer.views': 'diagnostics explorer.state explorer.viewer losses metrics parts plots',
    'explorer.pages': 'data explorer.state explorer.viewer explorer.views metrics plots segment.result',
    'explorer.replay': 'core data diagnostics explorer.pages explorer.state explorer.viewer explorer.views geometry '
    'metrics plots runs.config runs.inputs runs.masks runs.identity runs.state',
    'explorer.gallery': 'core explorer.views',
    'explorer.picker': 'core',
    'explorer.clips': 'data explorer.pages explorer.state explorer.viewer explorer.views plots segment.result',
    'explorer.save': 'commands.segment core data evaluate explorer.state explorer.viewer',
    'explorer.controls': 'core explorer.pages explorer.picker explorer.replay explorer.save explorer.state '
    'explorer.viewer explorer.views normalizer',
    'explorer.widget': 'core data evaluate explorer.clips explorer.controls explorer.gallery explorer.pages '
    'explorer.replay explorer.save explorer.state explorer.viewer explorer.views formats.images segment.result',
    'explorer.server': 'core explorer.state explorer.widget parts',
    # appendix
    'parts': 'core',
    'weights': 'core',
    'layouts': 'core',
    'geometry': 'core data',
    'backbone_specs': 'core',
    'tokens': 'backbone_specs core',
    'custom_backbone': 'backbone_specs core layouts parts weights',
    'feature_shards': 'core',
    'finer_grid': 'backbones core model slot_attention',
    'feature_measures': 'baselines core data diagnostics metrics normalizer',
    'feature_card_figure': 'feature_measures plots',
    'feature_card': 'backbones baselines core data feature_card_figure feature_measures features metrics normalizer '
    'plots',
    'plots': 'core',
    'study': 'runs.scored core evaluate features geometry metrics model runs.config runs.folder runs.inputs '
    'sweep train runs.state '
    'runs.verify',
    'label_free': 'core data diagnostics evaluate features geometry metrics refine runs.inputs runs.scored runs.state',
    'search_space': 'core label_free runs.config runs.executors sweep',
    'tune': 'core label_free runs.executors runs.owner runs.verify search_space sweep',
    'hub': 'core evaluate parts runs.checkpoints runs.config runs.identity runs.inputs runs.shipped',
    'report': 'core geometry metrics plots refine runs.checkpoints runs.notebooks runs.identity runs.state runs.verify',
    'speed': '',
    'cli': 'commands.flags core processes',
    # commands
    'commands.flags': '',
    'commands.segment': 'core data evaluate formats.detect mask_head.head refine runs.checkpoints runs.config '
    'runs.inputs '
    'segment.folder segment.segmenter',
    'commands.runs': 'core evaluate explorer.server explorer.state formats.detect mask_head.head mask_head.training '
    'parts processes report runs.checkpoints '
    'runs.config runs.extend runs.identity runs.inputs segment.folder search_space sweep train tune',
    'commands.publish': 'core hub',
    'commands.data': 'core diagnostics feature_card features formats.convert normalizer runs.config runs.inputs '
    'scenes.render weights',
}
LATE = {  # imported when it is asked for, not before
    ('train', 'fast.step'),
    ('sweep', 'fast.many_models'),
}
MODULES = sorted(
    '.'.join(p.relative_to(ROOT / 'slotnb').with_suffix('').parts) for p in (ROOT / 'slotnb').rglob('[a-z]*.py')
)


def arrows(module):
    "The modules of slotnb that a module imports."
    path = ROOT / 'slotnb' / (module.replace('.', '/') + '.py')
    package, found = module.split('.')[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) + 1 - node.level]
            name = '.'.join([*base, *(node.module or '').split('.')]).strip('.')
        elif (node.module or '').split('.')[0] == 'slotnb':
            name = node.module.partition('.')[2]
        else:
            continue
        found |= {name} if name in MODULES else {f'{name}.{a.name}'.strip('.') for a in node.names}
    return found


def test_every_module_has_its_place():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize('module', MODULES)
def test_arrows(module):
    beyond = arrows(module) - set(ALLOWED[module].split())
    assert not beyond, f'{module} may not import {beyond}'


def test_no_cycle():
    below = {m: {b for b in ok.split() if (m, b) not in LATE} for m, ok in ALLOWED.items()}
    placed = set()
    while len(placed) < len(below):
        ready = [m for m, b in below.items() if m not in placed and b <= placed]
        assert ready, f'a cycle among {set(below) - placed}'
        placed |= set(ready)


@pytest.mark.parametrize('module', MODULES)
def test_size(module):
    "At most 300 lines and 12 public names."
    path = ROOT / 'slotnb' / (module.replace('.', '/') + '.py')
    text = path.read_text()
    (names,) = [
        ast.literal_eval(n.value)
        for n in ast.parse(text).body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'
    ]
    assert len(text.splitlines()) <= 300 and len(names) <= 12, (len(text.splitlines()), names)


def test_every_module_stands_alone():
    "Each is imported with no other module of ours loaded before it; names that only notebooks define would show."
    code = """import importlib, sys
for m in sys.argv[1:]:
    for loaded in [k for k in sys.modules if k.split('.')[0]=='slotnb']: del sys.modules[loaded]
    importlib.import_module(f'slotnb.{m}')"""
    subprocess.run([sys.executable, '-c', code, *MODULES], check=True, cwd='/')


FOLDERS = [str(ROOT / name) for name in ('slotnb', 'nbs', 'guides', 'reports', 'tests', 'benchmarks')]


def test_lines_and_statements():
    """Lines of at most 120 characters, one statement a line. Exceptions: alt texts are one line, as Quarto reads
    it, and nbdev breaks `__all__` where it likes."""
    rules = 'E401,E501,E701,E702,E703'
    command = [sys.executable, '-m', 'ruff', 'check', '--select', rules, '--output-format', 'json', *FOLDERS]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)

    def is_exception(f):
        path, row = Path(f['filename']), f['location']['row'] - 1
        if f['code'] != 'E501':
            return False
        if path.suffix == '.py':
            return path.is_relative_to(ROOT / 'slotnb') and path.read_text().splitlines()[row].startswith('__all__')
        cell = json.loads(path.read_text())['cells'][f['cell'] - 1]
        return ''.join(cell['source']).splitlines()[row].startswith('#| fig-alt')

    found = [f for f in found if Path(f['filename']).name != '_modidx.py']  # written by nbdev
    wrong = [
        f"{Path(f['filename']).name}:{f.get('cell')}:{f['location']['row']} {f['code']}"
        for f in found
        if not is_exception(f)
    ]
    assert not wrong, wrong


def test_format():
    subprocess.run([sys.executable, '-m', 'ruff', 'format', '--check', '-q', *FOLDERS], check=True, cwd=ROOT)


def test_no_undefined_names():
    command = [sys.executable, '-m', 'ruff', 'check', '--select', 'F', '--ignore', 'F401', str(ROOT / 'slotnb')]
    subprocess.run(command, check=True)


def test_words_that_are_gone():
    "Names of an earlier version; a reader must not meet two names for one thing."
    gone = r'obstacle|arch_prctl|_linear_pointwise|look_at_held_out|within_reach|\blearnt|simpler dress|said aloud'
    command = ['git', 'grep', '-nIE', gone, '--', ':!CHANGELOG.md', ':!tests/test_house.py', ':!*.csv']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1:
        pytest.skip('not a git checkout')
    assert not done.stdout, done.stdout[:2000]


def notebooks():
    found = (p for folder in ('nbs', 'guides', 'reports') for p in ROOT.glob(f'{folder}/**/[!_]*.ipynb'))
    return sorted(p for p in found if '_build' not in p.parts)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources, exported and cleaned by nbdev."
    folder = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'guides', 'reports', 'slotnb'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '_build'))
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, folder)
    subprocess.run(['nbdev_export'], check=True, cwd=folder)
    subprocess.run(['nbdev_clean'], check=True, cwd=folder)
    return folder


def test_package_is_what_the_notebooks_export(copy):
    "Nobody edited slotnb/ by hand, nobody forgot to export."
    ours, theirs = ({p.relative_to(r): p for p in (r / 'slotnb').rglob('*.py')} for r in (ROOT, copy))
    assert set(ours) == set(theirs)
    for name, p in ours.items():
        assert p.read_text() == theirs[name].read_text(), f'{name} differs from what its notebook exports'


def test_every_module_has_a_notebook():
    "A deleted notebook leaves no module behind."
    for m in MODULES:
        path = ROOT / 'slotnb' / (m.replace('.', '/') + '.py')
        (source,) = set(re.findall(r'^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+?)\.$', path.read_text(), re.M))
        assert (path.parent / source).resolve().is_file(), f'{m}: {source} is not there'


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_notebook_is_clean(path, copy):
    """No execution counts, no widget state, no error, no metadata of somebody's editor; outputs are kept; the tag
    `parameters` survives nbdev_clean."""
    cleaned = json.loads((copy / path.relative_to(ROOT)).read_text())
    assert cleaned == json.loads(path.read_text()), f'run nbdev_clean on {path.name}'
    nb = json.loads(path.read_text())
    python = dict(display_name='python3', language='python', name='python3')
    assert nb['metadata'] == dict(kernelspec=python), (
        'JupyterLab would ask for a kernel, or there is more than it needs'
    )
    for i, c in enumerate(nb['cells']):
        src, where = ''.join(c['source']), f'{path.name}, cell {i}'
        assert set(c['metadata']) <= {'tags'} and 'attachments' not in c, where
        if c['cell_type'] != 'code':
            continue
        assert c['execution_count'] is None and not [
            o for o in c['outputs'] if o.get('execution_count') or o.get('metadata') or o['output_type'] == 'error'
        ], where
        if {'#| hide', '#| eval: false'} & set(src.splitlines()):
            continue
        if src.startswith('%%'):
            continue
        prints = [
            n
            for n in ast.parse(src).body
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and getattr(n.value.func, 'id', '') == 'print'
        ]
        assert not prints or [o for o in c['outputs'] if o['output_type'] == 'stream'], (
            f'{where} prints, and nothing is kept of it'
        )
        pictures = [o for o in c['outputs'] if {'image/png', 'image/svg+xml'} & set(o.get('data', {}))]
        assert bool(pictures) == src.startswith('#| fig-alt: '), (
            f'{where}: a cell with a figure begins with "#| fig-alt: ...", and no other does'
        )


@pytest.mark.parametrize('name', ['backbone_run', 'ta_report'])
def test_parameters_tag(name):
    cells = json.loads((ROOT / f'reports/{name}.ipynb').read_text())['cells']
    assert sum('parameters' in c['metadata'].get('tags', []) for c in cells) == 1
