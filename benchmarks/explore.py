"Response time of the explorer in a real browser, from the event to the changed pixels, scenes of 256 px, on the CPU."

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
import numpy as np
from playwright.sync_api import sync_playwright
from slotnb.runs.config import preset
from slotnb.runs.identity import versions
from slotnb.train import fit

ROOT = Path(__file__).parent.parent
# the time of the last event, and the time when its pictures were drawn
WATCH = '''() => {
  const start = (e) => { window.began = e.timeStamp; window.ended = null; };
  for (const kind of ['pointerdown', 'keydown', 'change']) addEventListener(kind, start, true);
  const pictures = document.querySelector('.slotnb:has([data-key=segments])');
  const drawn = new MutationObserver(() => requestAnimationFrame(() => { window.ended ??= performance.now(); }));
  drawn.observe(pictures, { attributes: true, attributeFilter: ['data-drawn'] });
}'''


def controls(page):
    "name: action, called with the number of the repeat."
    handle = lambda name: page.locator(f'.slotnb-control-{name} .noUi-handle')

    def click(i):
        canvas = page.locator('[data-key=image] canvas')
        box = canvas.bounding_box()
        canvas.click(position=dict(x=box['width'] * (0.1 + 0.08 * i), y=box['height'] * (0.9 - 0.08 * i)))

    def seed(i):
        box = page.locator('.slotnb-control-seed input')
        box.fill(str(100 + i))
        box.press('Enter')

    pick = lambda name, labels: (
        lambda i: page.locator(f'.slotnb-control-{name} select').select_option(labels[i % len(labels)])
    )
    return {
        'click into the image': click,
        'arrow key in the image': lambda i: page.locator('[data-key=image] .slotnb-frame').press(
            'ArrowLeft' if i % 2 else 'ArrowUp'
        ),
        'scene': lambda i: handle('scene').press('ArrowRight'),
        'temperature': lambda i: handle('temperature').press('ArrowLeft'),
        'slots': lambda i: handle('num_slots').press('ArrowLeft' if i % 2 else 'ArrowRight'),
        'iterations': lambda i: handle('num_iters').press('ArrowRight' if i < 6 else 'ArrowLeft'),
        'seed': seed,
        'normalizer': pick('normalizer', ['none', 'token', 'instance']),
        'masks from': pick('source', ['slot attention', 'decoder']),
    }


def refined(page):
    "Actions with refined masks; only those that change the masks are slow."
    page.locator('.slotnb-control-source select').select_option('slot attention, refined')
    handle = page.locator('.slotnb-control-scene .noUi-handle')
    return {
        'scene, masks refined': lambda i: handle.press('ArrowLeft'),
        'arrow key, masks refined': lambda i: page.locator('[data-key=image] .slotnb-frame').press(
            'ArrowLeft' if i % 2 else 'ArrowUp'
        ),
    }


def measure(page, actions, repeats):
    rows = {}
    for name, act in actions.items():
        times = []
        for i in range(repeats):
            page.wait_for_timeout(250)  # until the previous pictures are drawn
            page.evaluate('() => { window.began = window.ended = null; }')
            act(i)
            page.wait_for_function('() => window.began && window.ended > window.began', timeout=60000, polling=10)
            times.append(page.evaluate('() => window.ended - window.began'))
        rows[name] = dict(median=round(float(np.median(times))), largest=round(max(times)), repeats=repeats)
        print(f"{name:28} {rows[name]['median']:5} ms, at most {rows[name]['largest']} ms", flush=True)
    return rows


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--out', default=str(ROOT / 'benchmarks/explore.json'))
    ask.add_argument('--repeats', type=int, default=9)
    ask.add_argument('--decoder', default='attention')
    args, folder = ask.parse_args(), Path(tempfile.mkdtemp())
    run = fit(
        preset(
            'version_0_1',
            data_dir=str(ROOT / 'data/movi_a_subset'),
            save_dir=str(folder),
            num_epochs=2,
            warmup_epochs=1,
            decoder=args.decoder,
        ),
        False,
    )
    server = subprocess.Popen(
        [sys.executable, '-c', 'from slotnb.cli import main; raise SystemExit(main())', 'explore', str(run)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        link = server.stdout.readline().strip()
        assert link.startswith('http'), link
        with sync_playwright() as p:
            browser = p.chromium.launch(
                executable_path=os.environ.get('CHROMIUM') or shutil.which('chromium'),
                args=['--no-sandbox'] if os.geteuid() == 0 else [],
            )
            page = browser.new_page(viewport=dict(width=1600, height=1400))
            page.goto(link)
            page.wait_for_selector('[data-key=segments] canvas', timeout=120000)
            page.evaluate(WATCH)
            rows = measure(page, controls(page), args.repeats)
            rows |= measure(page, refined(page), args.repeats)
            info = dict(
                browser=browser.version,
                cores=os.cpu_count(),
                load=[round(x, 1) for x in os.getloadavg()],
                pixels=256,
                decoder=args.decoder,
                **versions(),
            )
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder)
    Path(args.out).write_text(
        json.dumps(
            dict(unit='milliseconds from the event to the changed pixels', machine=info, controls=rows), indent=1
        )
        + '\n'
    )


if __name__ == '__main__':
    main()
