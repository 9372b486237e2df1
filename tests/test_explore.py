"Explorers in a real browser: a moved control changes what plays, on the page without a kernel and in JupyterLab with one."
import importlib.util, json, os, socket, subprocess, sys, time
from pathlib import Path
from urllib.request import urlopen

import numpy as np, pytest, torch

import chromium
from disentangle_nb import cli
from disentangle_nb.data.notes import PITCH_CLASSES
from disentangle_nb.models.system import Disentangler
from disentangle_nb.synthesis.explore import Explorer, explorer_html, explorer_page, framed, move_times, page_plan

root = Path(__file__).resolve().parents[1]
RUNS, CHOICES, MOST = ('notes-small', 'move-small'), dict(timbre=['Violin', 'Trumpet'], pitch=[57, 69]), 40
SECONDS = .45  # of a sound on the page
SAMPLES = '''fetch(document.querySelector("audio").src).then(r => r.arrayBuffer()).then(b => new OfflineAudioContext(1, 1, 22050).decodeAudioData(b))
    .then(b => Array.from(b.getChannelData(0), v => Math.round(v*1e4)/1e4))'''
CLOCK = '''window.took = []; document.addEventListener("keydown", () => window.since = performance.now(), true)
    const sound = document.querySelector("audio"); sound.addEventListener("loadstart", () => window.made = performance.now())
    sound.addEventListener("playing", () => took.push([made - since, performance.now() - since])); 0'''
PLAYED = '''window.played = 0; document.querySelector("audio").addEventListener("playing", () => played++); 0'''
CAPTION = '[...document.querySelectorAll(".widget-html-content p")].map(p => p.textContent).join()'
each = pytest.mark.parametrize('system', RUNS, indirect=True)


@pytest.fixture(scope='module')
def system(request): return Disentangler.load(getattr(request, 'param', RUNS[0]), 'cpu')


@pytest.fixture(scope='module')
def browser():
    path = chromium.find()
    if not path: pytest.skip('no Chromium or Chrome on this machine (name one in $CHROME)')
    browser = chromium.Browser(path)
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def page(system, tmp_path_factory):
    return explorer_page(system, tmp_path_factory.mktemp('page')/'explore.html', choices=CHOICES, most=MOST)


def click(browser, selector):
    x, y = browser.evaluate(f'(r => [r.x + r.width/2, r.y + r.height/2])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())')
    for kind in ('mousePressed', 'mouseReleased'): browser.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)


def press(browser, key):
    for kind in ('keyDown', 'keyUp'): browser.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=dict(End=35, ArrowLeft=37, ArrowUp=38, ArrowRight=39)[key])


def after(browser, move):
    "Samples that play after a move, once there are others than before."
    old, n = browser.evaluate('document.querySelector("audio").src'), browser.evaluate('played')
    move()
    browser.wait(lambda: browser.evaluate(f'document.querySelector("audio").src != {json.dumps(old)} && played > {n}'), 'a new sound')
    return np.array(browser.evaluate(SAMPLES))


def alike(a, b):
    "Cosine between the magnitude spectra of two sounds."
    n = min(len(a), len(b))
    A, B = (np.abs(np.fft.rfft(np.asarray(v)[:n]*np.hanning(n))) for v in (a, b))
    return float(A @ B/np.sqrt((A @ A)*(B @ B)))


@each
def test_a_move_on_the_page_changes_what_plays(browser, page, system):
    browser.width(1280)
    browser.open(page.as_uri())
    browser.evaluate(PLAYED)
    plane = page_plan(Explorer(system), CHOICES, MOST)[1]
    (across, xs), (up, ys) = plane.items()
    first = after(browser, lambda: click(browser, '#plane button:nth-child(2)'))     # the top row is the highest
    want = lambda **kw: Explorer(system, SECONDS, 16).sound(**{'timbre': 'Violin', 'note': 'A', 'octave': 3, across: xs[1], up: ys[-1]} | kw)[:len(first)]
    assert alike(first, want()) > .95
    beside = after(browser, lambda: press(browser, 'ArrowRight'))
    assert alike(beside, want(**{across: xs[2]})) > .95 and alike(first, beside) < .999
    def choose(k, i): browser.evaluate(f'(s => {{ s.selectedIndex = {i}; s.dispatchEvent(new Event("change")) }})(document.querySelectorAll("select")[{k}])')
    trumpet = after(browser, lambda: choose(0, 1))
    assert alike(trumpet, want(timbre='Trumpet', **{across: xs[2]})) > .95 > alike(trumpet, beside)
    high = after(browser, lambda: choose(1, 1))
    assert alike(high, want(timbre='Trumpet', octave=4, **{across: xs[2]})) > .95 > alike(high, trumpet)
    assert 'Trumpet, A4' in browser.evaluate('document.querySelector("#said").textContent')
    assert not browser.evaluate('document.querySelector("#trouble").textContent')
    assert not browser.seen('Runtime.exceptionThrown')


@each
def test_every_place_holds_its_own_sound(browser, page, system):
    browser.open(page.as_uri())
    e, (across, xs), (up, ys) = Explorer(system, SECONDS, 16), *page_plan(Explorer(system), CHOICES, MOST)[1].items()
    last = len(xs)*len(ys) - 1
    for i in (0, last):
        browser.evaluate(f'document.querySelector("#play").checked = false; at = {i}; show(true)')
        got = np.array(browser.evaluate(SAMPLES))
        assert alike(got, e.sound(timbre='Violin', note='A', octave=3, **{across: xs[i % len(xs)], up: ys[i//len(xs)]})[:len(got)]) > .95
        assert browser.evaluate('document.querySelector("audio").duration') == pytest.approx(SECONDS, abs=.01)


def test_silence_stays_when_nothing_should_play_by_itself(browser, page):
    browser.open(page.as_uri())
    browser.evaluate(PLAYED)
    browser.wait(lambda: browser.evaluate('document.querySelector("audio").src'), 'the first sound')
    click(browser, '#play')
    browser.evaluate('go(0)')
    time.sleep(.3)
    assert browser.evaluate('played') == 0


def test_the_page_fits_and_asks_nobody(browser, page):
    for width in (1280, 390):
        browser.width(width)
        browser.open(page.as_uri())
        browser.wait(lambda: browser.evaluate('document.querySelector("audio").src'), 'the first sound')
        assert browser.evaluate('document.documentElement.scrollWidth') <= width
        urls = [e['request']['url'] for e in browser.seen('Network.requestWillBeSent')]
        assert all(u.startswith(('file:', 'blob:', 'data:')) for u in urls), urls
    names = browser.evaluate('[...document.querySelectorAll("#plane button")].map(b => b.getAttribute("aria-label"))')
    assert len(set(names)) == len(names) and all('centroid' in n for n in names)
    assert browser.evaluate('[...document.querySelectorAll("#plane button")].filter(b => b.tabIndex == 0).length') == 1


def test_in_a_frame_it_takes_height_and_theme(browser, system, tmp_path):
    frame = framed(explorer_html(system, choices=dict(timbre=['Oboe'], pitch=[69]), most=9)).data
    (tmp_path/'outside.html').write_text(f'<body data-theme="dark">{frame}</body>', encoding='utf-8')
    browser.width(390)
    browser.open((tmp_path/'outside.html').as_uri())
    inside = 'document.querySelector("iframe").contentDocument'
    fits = f'(d => d && d.documentElement.scrollHeight <= document.querySelector("iframe").clientHeight + 1 && d.querySelectorAll("#plane button").length)({inside})'
    browser.wait(lambda: browser.evaluate(fits), 'a frame as tall as its page')
    ground = f'getComputedStyle({inside}.body).backgroundColor'
    dark = browser.evaluate(ground)
    browser.evaluate('document.body.dataset.theme = "light"; new Promise(done => setTimeout(done, 50))')
    assert dark != browser.evaluate(ground)
    urls = [e['request']['url'] for e in browser.seen('Network.requestWillBeSent')]
    assert all(u.startswith(('file:', 'blob:', 'data:')) for u in urls), urls


@pytest.fixture
def lab(request, tmp_path):
    "Address of a JupyterLab of its own, on a notebook that shows the controls of a run."
    if importlib.util.find_spec('jupyterlab') is None: pytest.skip('JupyterLab is not installed')
    assert cli.explore([request.param, '--notebook', '--no-browser', '--out', str(tmp_path/'explore.ipynb')]) == 0
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS='1', IPYTHONDIR=str(tmp_path/'ipython')) | {f'JUPYTER_{k}_DIR': str(tmp_path/k) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    flags = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={tmp_path}',
             '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with (tmp_path/'log').open('w') as log: server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *flags], env=env, stdout=log, stderr=log, cwd=tmp_path)
    address, end = f'http://127.0.0.1:{port}', time.time() + 180
    def answers():
        try: return urlopen(f'{address}/api', timeout=2).status == 200
        except OSError: return False
    try:
        while not answers():
            assert server.poll() is None and time.time() < end, (tmp_path/'log').read_text()[-2000:]
            time.sleep(.2)
        yield f'{address}/lab/tree/explore.ipynb?reset'
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill()


def run_all(browser, lab):
    "Open a notebook and run its cells."
    browser.width(1280)
    browser.open(lab)
    browser.wait(lambda: browser.evaluate('!!window.jupyterapp && [...jupyterapp.shell.widgets("main")].some(w => w.sessionContext) && !!document.querySelector(".jp-Notebook .jp-Cell")'), 'JupyterLab')
    browser.evaluate('''(async () => { const rest = () => new Promise(done => setTimeout(done, 100)), w = [...jupyterapp.shell.widgets("main")].find(w => w.sessionContext)
        jupyterapp.shell.activateById(w.id)
        await w.context.ready; await w.sessionContext.ready
        for (let i = 0; i < 300 && w.sessionContext.session?.kernel?.status != "idle"; i++) await rest()
        await jupyterapp.commands.execute("notebook:run-all-cells") })()''')
    browser.wait(lambda: browser.evaluate('!!document.querySelector("audio")?.src && !!document.querySelector(".noUi-handle")'), 'the controls')


def moved(browser, move, says):
    "Samples that play after a move in JupyterLab, once the caption, which comes after them, says so."
    sound = after(browser, move)
    browser.wait(lambda: says in browser.evaluate(CAPTION), f'the caption {says!r}')
    return sound


@pytest.mark.parametrize('system, lab', zip(RUNS, RUNS), indirect=True, ids=RUNS)
def test_moved_sliders_and_menus_in_jupyterlab_change_what_plays(browser, lab, system):
    run_all(browser, lab)
    browser.evaluate(PLAYED), browser.evaluate(CLOCK)
    e, at, was = Explorer(system), {}, np.array(browser.evaluate(SAMPLES))
    assert len(e.sliders) == 3 and alike(was, e.sound()) > .95 and e.menus[0].start in browser.evaluate(CAPTION)
    for i, c in enumerate(e.sliders):
        browser.evaluate(f'document.querySelectorAll(".noUi-handle")[{i}].focus()')
        moved(browser, lambda: press(browser, 'ArrowRight'), f'{c.label} = {c.reach/20:g}')
        now, at[c.name] = moved(browser, lambda: press(browser, 'End'), f'{c.label} = {c.reach:g}'), c.reach
        assert alike(now, e.sound(**at)) > max(.95, alike(now, was))  # nearer to where the slider stands than to where it stood
        was = now
    for i in range(6): after(browser, lambda: press(browser, 'ArrowRight' if i % 2 else 'ArrowLeft'))
    made, played = np.median(browser.evaluate('took'), 0)
    print(f'from the key to the new sound {made:.0f} ms, until it plays {played:.0f} ms')
    choose = lambda k, v: browser.evaluate(f'(s => {{ s.value = "{v}"; s.dispatchEvent(new Event("change", {{ bubbles: true }})) }})(document.querySelectorAll(".widget-dropdown select")[{k}])')
    for k, (name, value) in enumerate(dict(timbre='Violin', note='A', octave=3).items()):
        at[name] = value
        now = moved(browser, lambda: choose(k, value), e.caption(at).rpartition(', ')[0])  # all but the centroid
        assert alike(now, e.sound(**at)) > .95 > alike(now, was)
        was = now


def test_a_move_is_quick(system):
    took = move_times(Explorer(system), 5)
    assert took['decoder'] < 200 and took['move'] < 1500  # generous for busy machines; tests/bench/bench_explore.py holds to 20 and 150


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.explore(['nobody', '--no-browser']) == 2 and not list(tmp_path.iterdir())
    (tmp_path/'letter.html').write_text('Dear mother')
    assert cli.explore(['tones-small', '--no-browser', '--out', 'letter.html']) == 2 and (tmp_path/'letter.html').read_text() == 'Dear mother'
    asked = []
    monkeypatch.setattr('webbrowser.open', asked.append)
    (tmp_path/'explore.html').write_text('<!doctype html>\n<!-- disentangle_nb explorer -->')      # a page of its own may be replaced
    assert cli.explore(['tones-small']) == 0
    assert asked == [(tmp_path/'explore.html').as_uri()] and (tmp_path/'explore.html').stat().st_size < 1.5e6
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None)
    assert cli.explore(['tones-small', '--notebook']) == 2 and "disentangle_nb[explore]" in capsys.readouterr().err


def test_pitches_that_were_not_trained_give_way():
    from disentangle_nb.models.move import move_model
    from disentangle_nb.features.nsgt import NSGTMel
    system = Disentangler(NSGTMel(n_bins=50), move_model(n_bins=50, n_timbre=2, pitches=(60, 62, 74)), dict(timbre=['a', 'b'], pitch=[60, 62, 74]))
    e = Explorer(system)
    assert [c.values for c in e.menus] == [('a', 'b'), ('C', 'D'), (4, 5)] and len(e.sliders) == 3
    assert e.midi(dict(note='C', octave=5)) == 60 and 'C4 (there is no C5)' in e.caption(dict(note='C', octave=5))
    code = e.codes([dict(timbre='b', note='D', octave=5, z1=2.)])
    assert code['timbre'].tolist() == [[0, 1]] and code['z'].tolist() == [[0, 2, 0]]
    assert code['pitch'][0].nonzero()[:, 0].tolist() == [(74 - 9) % 12, 12 + 5]
    assert e.sound().shape == (22050,) and PITCH_CLASSES[0] == 'C'
    with torch.no_grad(): system.model.up[2].conv.bias.fill_(-50.)  # nothing but silence
    assert e.sound().abs().max() == 0 and e.caption({}).endswith('silence')
    assert 'NaN' not in explorer_html(system, choices=dict(pitch=[60]), most=20)
    with torch.no_grad(): [p.fill_(torch.nan) for p in system.model.parameters()]
    with pytest.raises(ValueError, match='NaN'): e.sound()


def test_of_many_latents_those_that_change_most_get_sliders(system):
    from disentangle_nb.models.vae import SmallVAE
    tones = Disentangler.load('tones-small', 'cpu')
    torch.manual_seed(0)
    e = Explorer(Disentangler(tones.feature, SmallVAE(n_mels=64, n_frames=16, latent=12, channels=[16, 32, 48, 64]), {}))
    left = sorted(e.sway, key=e.sway.get)[:2]
    assert len(e.sliders) == 10 and not {*left} & {*e.controls} and e.codes([{}])['z'].shape == (1, 12)
