"""A real browser, by hand and nightly (`make browser`): JupyterLab runs chapter 05 from top to bottom, \
and a run's report shows its figures on a screen and on a phone.
Needs the package playwright and some Chromium or Chrome. Screenshots go to --out, for a person to look at."""
import argparse, json, os, re, shutil, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent

def fail(text): sys.exit(f'browser: {text}')

@contextmanager
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        fail('the package playwright is not installed: make browser does it, or pip install playwright')
    # else playwright's own
    found = next(filter(None, map(shutil.which,
                                  ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))),
                 None)
    with sync_playwright() as p:
        try:
            b = p.chromium.launch(executable_path=found, args=['--disable-gpu', '--disable-quic'],
                                  chromium_sandbox=False)
        except Error as e:
            fail(f'no browser started: apt-get install chromium, or playwright install chromium\n{e}')
        yield b
        b.close()

@contextmanager
def jupyterlab(folder, home):
    "A server on `folder` whose settings, kernels' files and history lie in `home`."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, HOME=str(home), JUPYTER_CONFIG_DIR=f'{home}/config',
               JUPYTER_DATA_DIR=f'{home}/data', JUPYTER_RUNTIME_DIR=f'{home}/runtime',
               IPYTHONDIR=f'{home}/ipython', JUPYTERLAB_SETTINGS_DIR=f'{home}/settings',
               JUPYTERLAB_WORKSPACES_DIR=f'{home}/workspaces', PYTHONPATH=str(folder.parent))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--ServerApp.port={port}',
               '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}']
    with open(home/'server.log', 'w') as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    quiet = home/'settings'/'@jupyterlab'/'apputils-extension'; quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            if server.poll() is not None:
                fail(f"JupyterLab stopped:\n{(home/'server.log').read_text()[-2000:]}")
            try: urllib.request.urlopen(f'{url}/api', timeout=2); break
            except OSError: time.sleep(.5)
        else: fail('JupyterLab did not answer within two minutes')
        yield url
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()

def code_cells(path):
    return [c for c in json.loads(path.read_text())['cells']
            if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
def is_figure(output): return any(k.startswith('image/') for k in output.get('data', {}))

def run_chapter(b, name, out, minutes):
    ("Opened, run by the menu, saved, and read from the file: "
     "every cell once, in order, without an error, with as many figures as are stored.")
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copytree(ROOT, copy := Path(tmp)/'copy',
                        ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'data', '_proc', '_docs',
                                                      '*.egg-info'))
        (home := Path(tmp)/'home').mkdir()
        path = copy/'nbs'/f'{name}.ipynb'
        stored, nb = code_cells(path), json.loads(path.read_text())
        for c in nb['cells']:  # what is there at the end was made here
            c.update(dict(outputs=[], execution_count=None) if c['cell_type'] == 'code' else {})
        path.write_text(json.dumps(nb))
        with jupyterlab(copy/'nbs', home) as url:
            page = b.new_page(viewport=dict(width=1280, height=1000))
            page.goto(f'{url}/lab/tree/{name}.ipynb?reset', timeout=120_000)
            page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=120_000)
            # the status bar: a kernel is there, and waits
            page.get_by_text(re.compile(r'\| Idle$')).wait_for(timeout=120_000)
            page.locator('.lm-MenuBar-item', has_text=re.compile('^Run$')).click()
            page.locator('li[data-command="runmenu:run-all"]').click()
            end = time.monotonic() + 60*minutes
            while True:                        # done: as many prompts as cells, or an error; the file says so
                if time.monotonic() > end:
                    page.screenshot(path=out/'jupyterlab_late.png')
                    fail(f'{name} did not finish within {minutes} minutes')
                page.wait_for_timeout(2000)
                page.keyboard.press('Control+s')
                page.wait_for_timeout(1000)
                try: cells = code_cells(path)
                except json.JSONDecodeError: continue          # it is being written
                if (any(o['output_type'] == 'error' for c in cells for o in c['outputs'])
                    or all(c['execution_count'] for c in cells)):
                    break
            page.locator('.jp-Notebook').first.evaluate(
                "n => { const s = n.querySelector('.jp-WindowedPanel-outer') || n; s.scrollTop = 0 }")
            for i,at in enumerate((0, .35, .7, 1)):
                page.locator('.jp-Notebook').first.evaluate(
                    "(n, at) => { const s = n.querySelector('.jp-WindowedPanel-outer') || n; "
                    "s.scrollTop = at * s.scrollHeight }", at)
                page.wait_for_timeout(2500)
                page.screenshot(path=out/f'jupyterlab_{i + 1}.png')
            page.close()
    errors = [f"{c['id']}: {o['ename']}: {o['evalue']}" for c in cells
              for o in c['outputs'] if o['output_type'] == 'error']
    if errors: fail(f'{name} in JupyterLab: {errors[0]}')
    if [c['execution_count'] for c in cells] != list(range(1, len(cells) + 1)):
        fail(f"{name} in JupyterLab: cells ran as {[c['execution_count'] for c in cells]}")
    figures = [sum(is_figure(o) for c in cs for o in c['outputs']) for cs in (stored, cells)]
    if figures[0] != figures[1]: fail(f'{name} in JupyterLab: {figures[1]} figures, {figures[0]} are stored')
    print(f'{name}: {len(cells)} cells ran in order in JupyterLab, {figures[1]} figures', flush=True)

def look_at_report(b, run, out):
    "All images of report.html are there and drawn, and nothing is wider than a phone."
    for name, width, height in (('screen', 1280, 900), ('phone', 390, 844)):
        page = b.new_page(viewport=dict(width=width, height=height))
        # the report is one file: it must do without the network
        page.route(re.compile('^https?:'), lambda route: route.abort())
        page.goto((run/'report.html').resolve().as_uri())
        images = page.eval_on_selector_all('img', 'all => all.map(i => [i.complete && i.naturalWidth > 50, '
                                                  'i.getBoundingClientRect().width > 50, i.alt])')
        too_wide = page.evaluate('document.documentElement.scrollWidth') - width
        page.screenshot(path=out/f'report_{name}.png', full_page=True)
        page.close()
        if len(images) < 3 or not all(ok and seen for ok,seen,_ in images):
            fail(f'report.html on a {name}: expected three figures or more, drawn, got {images}')
        if too_wide > 1:
            fail(f'report.html on a {name}: {too_wide} pixels wider than the window; '
                 f'see {out}/report_{name}.png')
        print(f'report.html on a {name}: {len(images)} figures, nothing wider than {width} px', flush=True)

def try_script(b):
    "The site's only script: links below the table of contents, and sections that are folded."
    import yaml
    quarto = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    script = quarto['format']['html']['include-after-body'][0]['text']
    at = 'github.com/deepcluster-nb/deepcluster-nb'
    link = '<li><a href="https://{}" class="toc-action"><i class="bi bi-github"></i>{}</a></li>'
    for edit in (f'{at}/edit/main/nbs/05_clustering.ipynb',
                 f'{at}/blob/main/nbs/05_clustering.ipynb'.replace('.com', '.dev')):
        page = b.new_page()
        page.set_content(f'<div class="toc-actions"><ul>{link.format(edit, "Edit this page")}'
                         f'{link.format(at + "/issues/new", "Report an issue")}</ul></div>'
                         '<section class="optional"><h2>Fast</h2><h3 id="bits">Bits</h3></section>'
                         '<a href="#bits">to it</a>' + script)
        links = dict(page.eval_on_selector_all('a', 'all => all.map(a => [a.textContent, a.href])'))
        notebook = 'deepcluster-nb/deepcluster-nb/blob/colab/nbs/05_clustering.ipynb'
        want = {'Open in Colab': f'https://colab.research.google.com/github/{notebook}',
                'Open in Kaggle': f'https://www.kaggle.com/kernels/welcome?src=https://github.com/{notebook}'}
        if len(links) != 5 or any(links.get(k) != v for k, v in want.items()): fail(f'the links: {links}')
        folded = [page.is_visible('#bits')]
        page.get_by_text('to it').click()
        page.wait_for_timeout(200)
        if folded + [page.is_visible('#bits')] != [False, True]:
            fail('a link into a folded section must open it')
        page.close()
    print('links to Colab and Kaggle, folded sections: as they should be', flush=True)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('runs/browser'), help='folder of the screenshots')
    parser.add_argument('--chapter', default='05_clustering', help='the notebook that is run')
    parser.add_argument('--run', type=Path, help='a finished run; a small one is made if there is none')
    parser.add_argument('--minutes', type=float, default=10, help='the chapter may take')
    a = parser.parse_args(argv)
    if a.run and not (a.run/'report.html').exists():
        fail(f'--run: expected a folder with a report.html, got {str(a.run)!r}')
    a.out.mkdir(parents=True, exist_ok=True)
    with browser() as b, tempfile.TemporaryDirectory() as tmp:
        try_script(b)
        if not a.run:
            small = [x for p in ('n_images=300', 'n_test=100', 'k=10', 'pca=16', 'epochs=3', 'passes=1')
                     for x in ('-p', p)]
            subprocess.run([sys.executable,
                            '-c', 'import sys; from deepcluster_nb.experiments import main; sys.exit(main())',
                            'run', 'train', '--preset', 'digits', '--out', f'{tmp}/run', *small],
                           check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        look_at_report(b, a.run or Path(tmp)/'run', a.out)
        run_chapter(b, a.chapter, a.out, a.minutes)
    print(f'screenshots in {a.out}')

if __name__ == '__main__': main()
