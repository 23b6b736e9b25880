"The house: arrows between modules go one way, every module stands alone, notebooks and package agree."

import ast, json, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

# a module may import those on its right, and no others
ALLOWED = dict(
    core='',
    products='core',
    physics='core',
    render='core physics',
    data='core',
    plots='core',
    metrics='core',
    refine='core',
    baselines='core',
    normalizer='core',
    losses='core',
    images='core data',
    shards='core data images',
    video='core data images',
    movi='core data',
    formats='core data plots images shards video movi',
    weights='core',
    fused='core products',
    backbones='core weights fused',
    slot_attention='core',
    diagnostics='core losses normalizer',
    decoder='core slot_attention',
    features='core backbones data',
    model='core slot_attention decoder',
    tiles='core',
    rounds='core slot_attention',
    panels='core rounds',
    backward='core products rounds slot_attention',
    step='core backward decoder losses model panels products tiles',
    stack='backward decoder losses model step',
    feature_card='core data plots metrics baselines diagnostics normalizer features backbones',
    train='core data formats weights backbones features normalizer losses metrics refine diagnostics model slot_attention step',
    vectorize='core normalizer stack step train',
    sweep='core backbones features metrics refine baselines train vectorize',
    report='core metrics plots refine train',
    study='core metrics normalizer sweep train vectorize',
    claims='core backbones baselines diagnostics feature_card losses metrics normalizer refine report step study sweep train',
    views='core data diagnostics features formats losses metrics model normalizer plots refine train',
    explore='core data normalizer train views',
    cli='core claims formats weights features normalizer diagnostics feature_card render sweep report train explore',
)
MODULES = sorted(p.stem for p in (ROOT / 'slotnb').glob('[a-z]*.py'))


def arrows(module):
    tree = ast.parse((ROOT / f'slotnb/{module}.py').read_text())
    inside = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
    absolute = {
        n.module.split('.')[1]
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('slotnb.')
    }
    return inside | absolute


def test_every_module_has_its_place():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize('module', MODULES)
def test_arrows(module):
    assert arrows(module) <= set(ALLOWED[module].split()), f'{module} imports what is not below it'


def test_no_cycle():
    seen = set()
    while len(seen) < len(ALLOWED):
        ready = [m for m, below in ALLOWED.items() if m not in seen and set(below.split()) <= seen]
        assert ready, f'a cycle among {set(ALLOWED) - seen}'
        seen |= set(ready)


def test_every_module_stands_alone():
    "Each is imported with no other module of ours loaded before it; names that only notebooks define would show."
    code = '''import importlib, sys
for m in sys.argv[1:]:
    for loaded in [k for k in sys.modules if k.split('.')[0]=='slotnb']: del sys.modules[loaded]
    importlib.import_module(f'slotnb.{m}')'''
    subprocess.run([sys.executable, '-c', code, *MODULES], check=True, cwd='/')


def test_no_undefined_names():
    subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--select', 'F', '--ignore', 'F401', str(ROOT / 'slotnb')], check=True
    )


def notebooks():
    return sorted(p for folder in ('nbs', 'guides', 'reports') for p in ROOT.glob(f'{folder}/[!_]*.ipynb'))


def test_package_is_what_the_notebooks_export(tmp_path):
    "Export into a copy and compare: nobody edited slotnb/ by hand, nobody forgot to export."
    import shutil

    copy = tmp_path / 'copy'
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            '.venv', '.git', '.cache', 'data', 'runs', 'checkpoints', '_*', '*.egg-info', '__pycache__'
        ),
    )
    shutil.copy(ROOT / 'slotnb/__init__.py', copy / 'slotnb')
    shutil.copy(ROOT / 'slotnb/_modidx.py', copy / 'slotnb')
    subprocess.run(['nbdev_export'], check=True, cwd=copy)
    for p in (ROOT / 'slotnb').glob('*.py'):
        assert (copy / 'slotnb' / p.name).read_text() == p.read_text(), (
            f'{p.name} differs from what its notebook exports'
        )
    assert {p.name for p in (copy / 'slotnb').glob('*.py')} == {p.name for p in (ROOT / 'slotnb').glob('*.py')}


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.stem)
def test_notebook_is_clean(path, tmp_path):
    "No execution counts, no widget state, no error, no metadata of somebody's editor; outputs are kept; the tag `parameters` survives nbdev_clean."
    copy = ROOT / f'{path.parent.name}/_clean_{path.name}'
    try:
        copy.write_text(path.read_text())
        subprocess.run(['nbdev_clean', '--fname', str(copy)], check=True, cwd=ROOT)
        assert json.loads(copy.read_text()) == json.loads(path.read_text()), f'run nbdev_clean on {path.name}'
    finally:
        copy.unlink()
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


def test_readme_is_the_index_notebook():
    "Every paragraph and every command of index.ipynb is in README.md."
    readme = (ROOT / 'README.md').read_text()
    for c in json.loads((ROOT / 'nbs/index.ipynb').read_text())['cells']:
        text = ''.join(c['source'])
        if c['cell_type'] == 'markdown' and not text.startswith('---'):
            assert text.strip() in readme, f'make readme: {text[:60]!r} is not in README.md'
