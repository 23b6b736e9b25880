"The documentation's site, built by the route that needs no Quarto: every link, anchor and picture, in words and in a real browser."

import ast, http.server, importlib.util, json, re, shutil, subprocess, sys, threading
from functools import partial
from pathlib import Path
import pytest, yaml
from bs4 import BeautifulSoup
from conftest import ROOT

ARTIFACTS = ROOT / 'tests/_artifacts'
spec = importlib.util.spec_from_file_location('_docs', ROOT / 'nbs/_docs.py')
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
NOTEBOOKS = [p for folder in ('nbs', 'guides', 'reports') for p in sorted((ROOT / folder).glob('[!_]*.ipynb'))]


@pytest.fixture(scope='session')
def site():
    "The built site; what was built before is built again only if its notebook or the package has changed."
    out = ARTIFACTS / 'site'
    docs.build_without_quarto(ROOT, out)
    docs.front_door(out)
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


# ---- what is listed, what is shown


def hrefs(entries):
    for e in entries:
        if isinstance(e, str):
            yield e
        else:
            yield from hrefs([e['href']] if 'href' in e else [])
            yield from hrefs(e.get('contents', []))


def test_every_notebook_is_rendered_and_in_the_sidebar():
    config = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    listed = [*hrefs(config['website']['sidebar']['contents'])]
    assert not [h for h in listed if not (ROOT / h).is_file()], 'the sidebar lists a page that is not there'
    assert len(listed) == len(set(listed))
    own = {str(p.relative_to(ROOT)) for p in NOTEBOOKS}
    assert own <= {str(p.relative_to(ROOT)) for p in docs.sources(ROOT)}, (
        'a folder of notebooks is missing from `render`'
    )
    assert own <= set(listed), f'not in the sidebar: {own - set(listed)}'


def test_links_anchors_pictures_and_alt_texts(site):
    problems = docs.check(site)
    assert not problems, '\n'.join(problems)


def test_the_checker_names_what_is_broken(site, tmp_path):
    "One break of each kind in a copy; each is named, and nothing else."
    copy = tmp_path / 'site'
    shutil.copytree(site, copy)
    (copy / 'nbs/32_losses.html').unlink()  # the sidebar of every page, and the map at home, lead to it
    page = copy / 'nbs/44_diagnostics.html'
    breaks = {
        'nowhere.html': '<a href="nowhere.html">x</a>',
        '08_model.html#no-such-part': '<a href="08_model.html#no-such-part">x</a>',
        'gone.png': '<img src="gone.png" alt="a picture">',
        'has no alt text': '<div id="bare"><img src="../site_libs/x.png"></div>',
        'directive': '<pre>#| export\nx = 1</pre>',
        '/home/somebody': '<p>see /home/somebody/slotnb</p>',
        'core.py#L99999': '<a href="https://github.com/slotnb/slotnb/blob/main/slotnb/core.py#L99999">source</a>',
        'published site': '<a href="https://slotnb.github.io/slotnb/nbs/core.html">core</a>',
    }
    (copy / 'site_libs/x.png').write_bytes(b'')
    text = page.read_text()
    assert '</main>' in text
    page.write_text(text.replace('</main>', ''.join(breaks.values()) + '</main>'))
    problems = docs.check(copy)
    for what in breaks:
        said = [p for p in problems if what in p]
        assert len(said) == 1 and said[0].startswith('nbs/44_diagnostics.html: '), (what, said)
    rest = [p for p in problems if not p.startswith('nbs/44_diagnostics.html: ') or '07_losses' in p]
    assert (
        'nbs/32_losses.html is missing' in rest and all('07_losses' in p for p in rest) and len(rest) > len(NOTEBOOKS)
    )


def public(module):
    tree = ast.parse((ROOT / f'slotnb/{module}.py').read_text())
    names = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'
    )
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in names]


def test_every_module_shows_its_api_with_links_to_its_source(site):
    by_module = {re.sub(r'^\d+_', '', p.stem): p.stem for p in NOTEBOOKS if p.stem[0].isdigit()}
    for path in sorted((ROOT / 'slotnb').glob('[a-z]*.py')):
        page = BeautifulSoup((site / f'nbs/{by_module[path.stem]}.html').read_text(), 'html.parser')
        shown = {h.get_text(strip=True) for h in page.find_all('h3', id=True)}
        assert set(public(path.stem)) <= shown, f'{path.stem}: {set(public(path.stem)) - shown} is not on its page'
        sources = [a['href'] for a in page.find_all('a', string='source')]
        assert len(sources) >= len(public(path.stem)) and all(f'/slotnb/{path.name}#L' in h for h in sources)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_title_cell(path):
    "nbdev makes the title cell into title and description and drops what else is in it."
    first = next(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# \S[^\n]*\n\n> \S[^\n]*\n?', first), (
        f'{path.name}: a title, an empty line, one line that begins with "> ", and no more: {first[:200]!r}'
    )


# ---- what Quarto calls; Quarto itself can't be had from a package registry, so its own rendering is first seen by .github/workflows/docs.yml


@pytest.mark.parametrize(
    'path',
    [
        ROOT / p
        for p in ('nbs/30_slot_attention.ipynb', 'nbs/32_losses.ipynb', 'nbs/index.ipynb', 'reports/claims.ipynb')
    ],
    ids=lambda p: p.stem,
)
def test_the_filter_as_quarto_calls_it(path):
    "In the notebook's folder, the notebook on stdin, and nothing but a notebook on stdout."
    done = subprocess.run(
        [sys.executable, ROOT / 'nbs/_filter.py'],
        input=path.read_text(),
        capture_output=True,
        text=True,
        cwd=path.parent,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(path.read_text()), json.loads(done.stdout)
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
    if path.stem[0].isdigit():
        for name in public(path.stem[3:]):
            assert any(f'### {name}\n' in s for s in shown), f'no API of {name}'
        assert not any('github.io' in s for s in shown)
    else:
        assert not shown


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
    'nbs/30_slot_attention.html',
    'reports/ta_report.html',
    'reports/claims.html',
    'reports/speed.html',
)
WIDE, PHONE = dict(width=1400, height=1000), dict(width=390, height=844)

READABLE = '''() => {
    // the least contrast among the texts that can be seen, as WCAG counts it; a half transparent text or ground is mixed with what is behind it
    const dot = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true}), known = {}
    const parse = c => [...(known[c] ??= (dot.clearRect(0, 0, 1, 1), dot.fillStyle = c, dot.fillRect(0, 0, 1, 1), [...dot.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v/255)))]
    const over = (top, low) => [0, 1, 2].map(i => top[i]*top[3] + low[i]*(1 - top[3])).concat(1)
    const luminance = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b }
    const ground = e => { const c = parse(getComputedStyle(e).backgroundColor); return c[3]==1 ? c : over(c, e.parentElement ? ground(e.parentElement) : [255, 255, 255, 1]) }
    const opacity = e => e ? parseFloat(getComputedStyle(e).opacity)*opacity(e.parentElement) : 1
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement, words = texts.currentNode.textContent.trim()
        if (!words || e.closest('script, style, svg, img') || !e.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue
        const style = getComputedStyle(e), low = ground(e), ink = parse(style.webkitTextFillColor); ink[3] *= opacity(e)
        const [a, b] = [luminance(over(ink, low)), luminance(low)].sort((x, y) => y - x)
        found.push([(a + .05)/(b + .05), words.slice(0, 40), e.tagName, e.className])
    }
    return found.sort((x, y) => x[0] - y[0])
}'''


@pytest.fixture
def open_page(browser, address):
    "Open a page of the site; what lies elsewhere (web fonts) is not fetched. In the end no page may have complained."
    said, contexts = [], []

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
                said.append((page.url, m.text))
                if m.type == 'error' and 'favicon' not in m.location.get('url', '')
                else None
            ),
        )
        page.on('pageerror', lambda e: said.append((page.url, str(e))))
        page.goto(f'{address}/{path}')
        return page

    yield open_
    for c in contexts:
        c.close()
    assert not said, said


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
    page.locator('input[type=search]:visible, .smalldocs-search input:visible').first.press_sequentially(
        'SlotAttention'
    )
    hit = page.locator('a.search-result', has_text='slot_attention').first
    hit.wait_for()
    screenshot(page, 'search')
    hit.click()
    page.wait_for_url('**/30_slot_attention.html*')
    assert page.locator('h3#slotattention').count() == 1


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
            "[...document.querySelectorAll('main img')].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight])"
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
