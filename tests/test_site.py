"The built site in a real browser: it fits, it sounds, it finds, and it asks nobody else for anything."
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import chromium

root = Path(__file__).resolve().parents[1]
site = root/'_site'
pages = sorted(p.name for p in site.glob('*.html') if p.name not in ('search.html', 'genindex.html'))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def address():
    if not pages: pytest.skip('no site in _site/: `make docs` builds it')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(address):
    path = chromium.find()
    if not path: pytest.skip('no Chromium or Chrome on this machine (name one in $CHROME)')
    browser = chromium.Browser(path)
    yield browser
    browser.close()


def faults_of_requests(browser, address):
    "Requests to anybody else, answers that are errors, scripts that threw."
    urls = [e['request']['url'] for e in browser.seen('Network.requestWillBeSent')]
    yield from (f'asks {u}' for u in urls if not u.startswith((address, 'data:', 'blob:')))
    answers = [e['response'] for e in browser.seen('Network.responseReceived')]
    yield from (f"{a['status']} for {a['url']}" for a in answers if a['status'] >= 400)
    yield from (f"script: {e['exceptionDetails']['text']}" for e in browser.seen('Runtime.exceptionThrown'))


# The page's own width: a phone's innerWidth grows with what overflows. The theme's columns scroll too, and must not.
TOO_WIDE = '''width => Math.max(document.documentElement.scrollWidth - width,
    ...[...document.querySelectorAll(".page, .main, .content, .article-container, article")]
        .filter(e => getComputedStyle(e).overflowX != "visible").map(e => e.scrollWidth - e.clientWidth))'''
WIDEST = '''width => [...document.querySelectorAll("article *")].filter(e => e.getBoundingClientRect().right > width + 1)
    .slice(0, 1).map(e => e.tagName + "." + e.className).join()'''


@pytest.mark.parametrize('width', [1280, 390])
def test_pages_fit_and_stay_here(browser, address, width):
    browser.width(width)
    faults = []
    for page in pages:
        browser.open(address + page)
        wide = browser.evaluate(f'({TOO_WIDE})({width})')
        if wide > 0: faults.append(f'{page}: {wide} px too wide, first at ' + browser.evaluate(f'({WIDEST})({width})'))
        faults += [f'{page}: {f}' for f in faults_of_requests(browser, address)]
    assert not faults, '\n'.join(faults)


DURATIONS = '''Promise.all([...document.querySelectorAll("audio")].map(a => new Promise(done => {
    const say = () => done(a.duration), fail = () => done(-1);
    a.preload = "metadata";
    if (a.readyState > 0) return say();
    a.addEventListener("loadedmetadata", say); a.addEventListener("error", fail);
    a.querySelectorAll("source").forEach(s => s.addEventListener("error", fail));
    a.load(); setTimeout(fail, 10000); })))'''


def test_every_sound_has_a_duration(browser, address):
    browser.width(1280)
    with_sound = [p for p in pages if '<audio' in (site/p).read_text(encoding='utf-8')]
    assert with_sound, 'no page of the site plays a sound'
    for page in with_sound:
        browser.open(address + page)
        durations = browser.evaluate(DURATIONS)
        assert durations and all(0 < d < 60 for d in durations), f'{page}: durations in s {durations}'


def test_formulas_are_typeset(browser, address):
    page = next((p for p in pages if 'class="math' in (site/p).read_text(encoding='utf-8')), None)
    if not page: pytest.skip('no page has a formula')
    if not (site/'_static'/'vendor'/'tex-svg-full.js').stat().st_size: pytest.skip('built without MathJax')
    browser.open(address + page)
    browser.wait(lambda: browser.evaluate('document.querySelectorAll("mjx-container").length'), f'formulas on {page}')


def test_search_finds(browser, address):
    browser.open(address + 'search.html?q=timbre')
    found = '[...document.querySelectorAll("#search-results li a")].map(a => a.getAttribute("href"))'
    assert any('.html' in href for href in browser.wait(lambda: browser.evaluate(found), 'a search result'))
    assert not list(faults_of_requests(browser, address))
