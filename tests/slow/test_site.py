"""The documentation's site: every link, anchor and picture, as text and in a real browser. It is built without Quarto,
or, if the variable SLOTNB_SITE names the folder of a built site, taken from there: Quarto's HTML is read too."""

import ast
import http.server
import importlib.util
import json
import os
import re
import shutil
import threading
from functools import partial
from pathlib import Path
import pytest
import yaml
from bs4 import BeautifulSoup
from filelock import FileLock
from conftest import ROOT

ARTIFACTS = ROOT / 'tests/_artifacts'
spec = importlib.util.spec_from_file_location('_docs', ROOT / 'nbs/_docs.py')
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
NOTEBOOKS = [p for p in docs.sources(ROOT) if p.suffix == '.ipynb']  # all of them: tests/test_reading_order.py
MODULES = sorted((ROOT / 'slotnb').rglob('[a-z]*.py'))


@pytest.fixture(scope='session')
def site(testrun_uid):
    "The site, built once for all workers of pytest-xdist."
    if built := os.environ.get('SLOTNB_SITE'):
        docs.filter_pages(ROOT)  # for the tests of what both builders read
        return Path(built).resolve()
    out, built = ARTIFACTS / 'site', ARTIFACTS / 'site_built_by'
    ARTIFACTS.mkdir(exist_ok=True)
    with FileLock(ARTIFACTS / 'site.lock'):
        if not built.is_file() or built.read_text() != testrun_uid:
            docs.build_without_quarto(ROOT, out)
            docs.front_door(out)
            built.write_text(testrun_uid)
    return out


@pytest.fixture(scope='session')
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


# ---- what is shown


def test_links_anchors_pictures_and_alt_texts(site):
    problems = docs.check(site)
    assert not problems, '\n'.join(problems)


def test_the_checker_names_what_is_broken(site, tmp_path):
    "One break of each kind in a copy; each is named, and nothing else."
    copy = tmp_path / 'site'
    shutil.copytree(site, copy)
    (copy / 'nbs/07_losses.html').unlink()  # the sidebar of every page and the map of the home page lead to it
    page = copy / 'nbs/12_diagnostics.html'
    (copy / 'site_libs/x.png').write_bytes(b'')
    breaks = {
        'nowhere.html': '<a href="nowhere.html">x</a>',
        '08_model.html#no-such-part': '<a href="08_model.html#no-such-part">x</a>',
        'gone.png': '<img src="gone.png" alt="a picture">',
        'has no alt text': '<div id="bare"><img src="../site_libs/x.png"></div>',
        'directive': '<pre>#| export\nx = 1</pre>',
        'object at 0x7f2a>': '<pre>&lt;slotnb.Gallery object at 0x7f2a&gt;</pre>',
        '( *args, **kwargs ):': '<pre>def Picture(\n    *args, **kwargs\n):</pre>',
        '/home/somebody': '<p>see /home/somebody/slotnb</p>',
        'core.py#L99999': '<a href="https://github.com/slotnb/slotnb/blob/main/slotnb/core.py#L99999">source</a>',
        'published site': '<a href="https://slotnb.github.io/slotnb/nbs/core.html">core</a>',
    }
    text = page.read_text()
    assert '</main>' in text
    page.write_text(text.replace('</main>', ''.join(breaks.values()) + '</main>'))
    problems = docs.check(copy)
    for what in breaks:
        named = [p for p in problems if what in p]
        assert len(named) == 1 and named[0].startswith('nbs/12_diagnostics.html: '), (what, named)
    rest = [p for p in problems if not p.startswith('nbs/12_diagnostics.html: ') or '07_losses' in p]
    assert (
        'nbs/07_losses.html is missing' in rest and all('07_losses' in p for p in rest) and len(rest) > len(NOTEBOOKS)
    )


def public(path):
    "The public functions and classes of a module's file."
    tree = ast.parse(path.read_text())
    names = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'
    )
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]


def notebook_of(path):
    "The notebook that exports a module, relative to the root; nbdev names it in the module's first lines."
    return Path(re.search(r'File to edit: (?:\.\./)*(\S+\.ipynb)', path.read_text())[1])


def test_every_module_shows_its_api_with_links_to_its_source(site):
    for path in MODULES:
        page = BeautifulSoup((site / notebook_of(path).with_suffix('.html')).read_text(), 'html.parser')
        shown = {h.get_text(strip=True) for h in page.find_all('h3') if h.get('id') or h.parent.get('id')}
        assert set(public(path)) <= shown, f'{path.stem}: {set(public(path)) - shown} is not on its page'
        sources = [a['href'] for a in page.find_all('a', string='source')]
        name = path.relative_to(ROOT).as_posix()
        assert len(sources) >= len(public(path)) and all(f'/{name}#L' in h for h in sources)


def test_pages_link_to_each_other_from_any_depth(site):
    "Names of pages, symbols and the sidebar lead from one folder to another; that the links exist is tested above."

    def links(path, **part):
        "Pages of the site that a part of a page links to, relative to the site."
        body = BeautifulSoup((site / path).read_text(), 'html.parser').find(**part)
        return {os.path.normpath(Path(path).parent / a['href']) for a in body.find_all('a', href=True)}

    home = links('nbs/index.html', name='main')
    assert {f'nbs/{n}.html' for n in ('05_slot_attention', 'formats/movi', 'explore')} <= home
    assert {'guides/tutorial.html', 'reports/claims.html'} <= home
    sidebar = links('nbs/formats/movi.html', id='quarto-sidebar')
    assert {f'nbs/{n}.html' for n in ('formats/movi', '05_slot_attention', 'scenes/render')} <= sidebar
    assert 'guides/tutorial.html' in sidebar
    nested = [p.relative_to(site).as_posix() for p in site.glob('nbs/*/*.html')]
    symbols = {h for n in nested for h in links(n, name='main') if re.search(r'\.html#', h)}
    assert symbols, 'nbdev linked no symbol of a nested module'


def test_numbers_stay_together_and_signatures_stand_once(site):
    "No line ends between a number and its spread or percent sign; the source below a signature is folded."
    for p in docs.sources(ROOT):
        page = BeautifulSoup((site / p.relative_to(ROOT)).with_suffix('.html').read_text(), 'html.parser')
        main = page.find('main')
        for code in main.find_all(['pre', 'code']):
            code.decompose()
        assert not (found := re.search(r'.{20}\d (±|%).{5}', main.get_text())), (p.name, found)
    picture = BeautifulSoup((site / 'nbs/explorer/views.html').read_text(), 'html.parser').find('main')
    signature = next(e.get_text() for e in picture.find_all('pre') if e.get_text().startswith('def Picture('))
    assert '    key:str, # the same for the same place on the page' in signature.splitlines()
    assert "    color:str='', # of its frame, in CSS" in signature.splitlines()
    sources = picture.find_all('summary', string=re.compile('Exported source'))
    assert sources and not [s for s in sources if s.parent.has_attr('open')]
    report = BeautifulSoup((site / 'reports/ta_report.html').read_text(), 'html.parser').find('main')
    assert len(report.find('h2').find_all_previous('details')) <= 1, 'a row of folds before the answer'


# ---- what both builders read; Quarto itself renders in .github/workflows/docs.yml


@pytest.mark.parametrize(
    'name',
    [
        'nbs/05_slot_attention',
        'nbs/07_losses',
        'nbs/formats/movi',
        'nbs/appendix/plots',
        'nbs/index',
        'reports/claims',
    ],
)
def test_the_filtered_notebook(site, name):
    path = ROOT / f'{name}.ipynb'
    before, after = json.loads(path.read_text()), json.loads((ROOT / f'_proc/{name}.ipynb').read_text())
    src = lambda c: ''.join(c['source'])
    alts = lambda nb: [
        line for c in nb['cells'] for line in src(c).splitlines() if line.startswith('#| fig-alt:') and c['outputs']
    ]
    pictures = lambda nb: sum('image/png' in o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', []))
    assert alts(after) == alts(before) and pictures(after) == pictures(before)
    assert not [c for c in after['cells'] if re.search(r'^#\| *(export|exports|hide|default_exp|eval)\b', src(c), re.M)]
    assert 'widgets' not in after['metadata']
    front = yaml.safe_load(src(after['cells'][0]).strip().strip('-')) if after['cells'][0]['cell_type'] == 'raw' else {}
    assert front['title'] and front['description'] and 'output-file' not in front
    shown = [
        ''.join(o['data']['text/markdown'])
        for c in after['cells']
        if 'show_doc(' in src(c)
        for o in c['outputs']
        if 'text/markdown' in o.get('data', {})
    ]
    modules = [m for m in MODULES if notebook_of(m) == path.relative_to(ROOT)]
    for module in modules:
        for public_name in public(module):
            assert any(f'### {public_name}\n' in s for s in shown), f'no API of {public_name}'
        assert not any('github.io' in s for s in shown)
    assert bool(shown) == bool(modules)


def test_quarto_gets_what_smalldocs_gets(site, tmp_path, monkeypatch):
    "A stand-in for Quarto records what it is called with; its output becomes the site."
    calls = []

    def quarto(command, **kwargs):
        calls.append(command)
        made = Path(command[-1]) / '_docs/nbs'
        made.mkdir(parents=True)
        (made / 'index.html').write_text('made by Quarto')

    monkeypatch.setattr(docs.subprocess, 'run', quarto)
    out = tmp_path / 'out'
    docs.build_with_quarto(ROOT, out)
    assert calls == [['quarto', 'render', str(ROOT / '_proc')]]
    assert (out / 'nbs/index.html').read_text() == 'made by Quarto' and not (ROOT / '_proc/_docs').exists()
    assert {p.relative_to(ROOT / '_proc') for p in (ROOT / '_proc').rglob('*') if p.suffix in ('.ipynb', '.md')} == {
        p.relative_to(ROOT) for p in docs.sources(ROOT)
    }
    assert (ROOT / '_proc/_quarto.yml').read_text() == (ROOT / '_quarto.yml').read_text()
    assert 'ipynb-filters' not in (ROOT / '_quarto.yml').read_text()


def test_the_workflow_publishes_with_quarto_and_asks_for_no_more_than_that():
    flow = yaml.safe_load((ROOT / '.github/workflows/docs.yml').read_text())
    assert flow['permissions'] == {'contents': 'read'}
    publish = flow['jobs']['publish']
    assert publish['permissions'] == {'pages': 'write', 'id-token': 'write'}
    uses = [s.get('uses', '').split('@')[0] for job in flow['jobs'].values() for s in job['steps']]
    assert 'quarto-dev/quarto-actions/setup' in uses and uses.index('quarto-dev/quarto-actions/setup') < uses.index(
        'actions/upload-pages-artifact'
    ) < uses.index('actions/deploy-pages')
    assert any(s.get('run') == 'make docs' for s in flow['jobs']['build']['steps'])


# ---- as a reader sees it

SHOWN = (
    'nbs/index.html',
    'nbs/05_slot_attention.html',
    'nbs/formats/movi.html',
    'reports/ta_report.html',
    'reports/claims.html',
    'reports/speed.html',
)
WIDE, PHONE = dict(width=1400, height=1000), dict(width=390, height=844)

READABLE = '''() => {
    // the lowest contrast of a visible text, as WCAG defines it; transparent colors are mixed with what is behind
    const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}), known = {}
    const dot = canvas.getContext('2d', {willReadFrequently: true})
    const draw = c => {
        dot.clearRect(0, 0, 1, 1); dot.fillStyle = c; dot.fillRect(0, 0, 1, 1)
        return dot.getImageData(0, 0, 1, 1).data
    }
    const parse = c => [...(known[c] ??= [...draw(c)].map((v, i) => i < 3 ? v : v/255))]
    const over = (top, low) => [0, 1, 2].map(i => top[i]*top[3] + low[i]*(1 - top[3])).concat(1)
    const linear = v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4
    const luminance = c => { const [r, g, b] = c.slice(0, 3).map(linear); return .2126*r + .7152*g + .0722*b }
    const behind = e => e.parentElement ? ground(e.parentElement) : [255, 255, 255, 1]
    const ground = e => { const c = parse(getComputedStyle(e).backgroundColor)
        return c[3] < 1 ? over(c, behind(e)) : c }
    const opacity = e => e ? parseFloat(getComputedStyle(e).opacity)*opacity(e.parentElement) : 1
    const visible = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true})
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement, words = texts.currentNode.textContent.trim()
        if (!words || e.closest('script, style, svg, img') || !visible(e)) continue
        const low = ground(e), ink = parse(getComputedStyle(e).webkitTextFillColor)
        ink[3] *= opacity(e)
        const [a, b] = [luminance(over(ink, low)), luminance(low)].sort((x, y) => y - x)
        found.push([(a + .05)/(b + .05), words.slice(0, 40), e.tagName, e.className])
    }
    return found.sort((x, y) => x[0] - y[0])
}'''


@pytest.fixture
def open_page(browser, address):
    "Open a page of the site without fetching anything from elsewhere (web fonts). No page may report an error."
    errors, contexts = [], []

    def open_(path, scheme='light', viewport=WIDE):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion='reduce')
        contexts.append(context)
        context.set_default_timeout(60_000)
        context.route(
            lambda url: not url.startswith((address, 'data:')), lambda route: route.fulfill(status=200, body='')
        )
        page = context.new_page()
        page.on(
            'console',
            lambda m: (
                errors.append((page.url, m.text))
                if m.type == 'error' and 'favicon' not in m.location.get('url', '')
                else None
            ),
        )
        # Quarto's pages call libraries that they load from elsewhere
        elsewhere = re.compile(r'\b(define|require|requirejs|jQuery|\$|MathJax|renderMathInElement) is not defined')
        page.on('pageerror', lambda e: None if elsewhere.search(str(e)) else errors.append((page.url, str(e))))
        page.goto(f'{address}/{path}')
        return page

    yield open_
    for c in contexts:
        c.close()
    assert not errors, errors


def screenshot(page, name):
    page.screenshot(path=ARTIFACTS / f'site_{name}.png')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_both_themes_can_be_read(open_page, scheme):
    "4.5 is what WCAG AA asks of running text."
    for path in SHOWN:
        page = open_page(path, scheme)
        found = page.evaluate(READABLE)
        screenshot(page, f'{Path(path).stem}_{scheme}')
        assert len(found) > 100 and found[0][0] >= 4.5, (path, scheme, found[:5])
        ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert (int(re.findall(r'\d+', ground)[0]) > 128) == (scheme == 'light')


def test_the_theme_can_be_chosen_and_is_kept(open_page):
    page = open_page('nbs/index.html')
    ground = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
    light = ground()
    page.locator('.quarto-color-scheme-toggle:visible').first.click()
    page.wait_for_function('before => getComputedStyle(document.body).backgroundColor != before', arg=light)
    dark = ground()
    page.goto(page.url.replace('index', '07_losses'))
    assert ground() == dark


def test_search_finds_slot_attention(open_page):
    page = open_page('nbs/index.html')
    if (button := page.locator('.aa-DetachedSearchButton:visible')).count():  # Quarto's search opens over the page
        button.first.click()
    page.locator('input[type=search]:visible, .smalldocs-search input:visible').first.press_sequentially(
        'SlotAttention'
    )
    hit = page.locator('a.search-result, a.search-result-link', has_text='slot_attention').first
    hit.wait_for()
    screenshot(page, 'search')
    hit.click()
    page.wait_for_url('**/05_slot_attention.html*')
    assert page.locator('h3#slotattention, #slotattention > h3').count() == 1


def test_every_page_on_a_phone(open_page, site):
    "Nothing is wider than the screen, every figure has a size, and the contents are one tap away."
    pages = [
        p.relative_to(site).as_posix()
        for p in sorted(site.rglob('*.html'))
        if 'site_libs' not in p.parts and p.name != 'index.html' or p.parent.name == 'nbs'
    ]
    assert len(pages) > len(NOTEBOOKS)
    page = open_page(pages[0], viewport=PHONE)
    for path in pages:
        page.goto(page.url.split('/', 3)[0] + '//' + page.url.split('/')[2] + f'/{path}')
        width = page.evaluate('document.documentElement.scrollWidth')
        assert width <= PHONE['width'], f'{path} is {width} px wide'
        sizes = page.evaluate(
            "[...document.querySelectorAll('main img:not([src^=http])')]"  # badges are elsewhere
            '.map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight])'
        )
        assert all(done and natural > 50 and w > 50 and h > 10 for done, natural, w, h in sizes), (path, sizes)
        if path in SHOWN:
            screenshot(page, f'{Path(path).stem}_phone')
    page.locator('.quarto-btn-toggle:visible').first.click()
    entry = page.locator('#quarto-sidebar a', has_text='slot_attention').first
    entry.scroll_into_view_if_needed()
    page.wait_for_function(
        'e => { const r = e.getBoundingClientRect(); return r.left >= 0 && r.right <= innerWidth }',
        arg=entry.element_handle(),
    )
    screenshot(page, 'contents_phone')


def test_the_address_leads_home(open_page):
    page = open_page('')
    page.wait_for_url('**/nbs/index.html')
    assert page.title().startswith('slotnb')
