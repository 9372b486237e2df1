"A real Chromium or Chrome, driven through its DevTools protocol: as much as the site's checks need."
import json, os, shutil, signal, subprocess, tempfile, time
from pathlib import Path
from urllib.request import urlopen

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome',
         '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome', '/Applications/Chromium.app/Contents/MacOS/Chromium')
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--mute-audio', '--disable-extensions',
         '--disable-background-networking', '--disable-component-update', '--disable-sync', '--remote-allow-origins=*', '--remote-debugging-port=0')


def find():
    "The browser named by $CHROME or found on this machine, else None."
    return next((p for p in map(shutil.which, [os.environ.get('CHROME', ''), *NAMES]) if p), None)


class Browser:
    def __init__(self, path, timeout=60):
        import websocket
        self.home, self.timeout, self.sent, self.events = tempfile.mkdtemp(), timeout, 0, []
        self.process = subprocess.Popen([path, *FLAGS, f'--user-data-dir={self.home}', 'about:blank'], start_new_session=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = self.wait(self._port, 'the browser to start')
            page = self.wait(lambda: self._page(port), 'its first page')
            self.socket = websocket.create_connection(page, timeout=timeout)
            for domain in ('Page', 'Network', 'Runtime'): self.call(f'{domain}.enable')
        except BaseException: self.close(); raise

    def _port(self):
        if self.process.poll() is not None: raise RuntimeError(f'the browser ended with code {self.process.returncode}')
        text = (Path(self.home)/'DevToolsActivePort')
        return text.exists() and text.read_text().partition('\n')[0]

    def _page(self, port):
        with urlopen(f'http://127.0.0.1:{port}/json/list', timeout=5) as r: found = json.load(r)
        return next((p['webSocketDebuggerUrl'] for p in found if p['type'] == 'page'), None)

    def wait(self, ready, what):
        "The first true value of `ready()`."
        end = time.time() + self.timeout
        while time.time() < end:
            if value := ready(): return value
            time.sleep(.05)
        raise TimeoutError(f'waited {self.timeout} s for {what}')

    def call(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps(dict(id=self.sent, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get('id') != self.sent:
            self.events.append(answer)
            if answer.get('method') == 'Page.javascriptDialogOpening':  # an unsaved notebook asks whether one may leave
                self.socket.send(json.dumps(dict(id=0, method='Page.handleJavaScriptDialog', params=dict(accept=True))))
        if 'error' in answer: raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer['result']

    def evaluate(self, script):
        "Value of a JavaScript expression; promises are awaited."
        got = self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in got: raise RuntimeError(got['exceptionDetails'].get('exception', {}).get('description', str(got)))
        return got['result'].get('value')

    def width(self, px):
        self.call('Emulation.setDeviceMetricsOverride', width=px, height=900, deviceScaleFactor=1, mobile=px < 600)

    def open(self, url):
        "Load `url`; its events are kept until the next one."
        self.events.clear()
        self.call('Page.navigate', url=url)
        self.wait(lambda: self.evaluate(f'document.readyState == "complete" && location.href.startsWith({json.dumps(url)})'), url)
        self.evaluate('new Promise(done => setTimeout(done, 50))')

    def seen(self, method): return [e['params'] for e in self.events if e.get('method') == method]

    def close(self):
        try: os.killpg(self.process.pid, signal.SIGTERM)
        except ProcessLookupError: pass
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL); self.process.wait(10)
        shutil.rmtree(self.home, ignore_errors=True)
