"Every notebook in a process of its own, top to bottom, as a reader would run it; and each that exports must check something."
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted((root/'nbs').glob('*.ipynb'), reverse=True) # the studies take longest: they start first
TIMEOUT = 600 # s; the house budget is 90, this one only ends what hangs

RUN = '''
import sys, torch
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
torch.set_num_threads(1)
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=sys.argv[2])
print('ran to its end' if ok else 'failed')
'''


@pytest.mark.parametrize('path', notebooks, ids=[p.stem for p in notebooks])
def test_runs_to_its_end(path):
    env = dict(os.environ, IN_TEST='1', MPLBACKEND='agg', OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', RUN, str(path), str(root)], cwd=root, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    # The marker catches a notebook that ends its process with code 0 half way.
    assert done.returncode == 0 and done.stdout.endswith('ran to its end\n'), (done.stdout[-1500:] + '\n' + done.stderr[-6000:])


CHECK = re.compile(r'(?<![\w.#])(assert\s|test_\w+\(|expect_fail\(|ExceptionExpected\b)')
SKIPPED = re.compile(r'^#\s*\|\s*(slow|gpu|notest|eval:\s*false)', re.M)


def test_every_exporting_notebook_asserts_something():
    silent = []
    for path in notebooks:
        code = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        exports = any(re.search(r'^#\s*\|\s*default_exp', s, re.M) for s in code)
        if exports and not any(CHECK.search(s) for s in code if not SKIPPED.search(s)): silent.append(path.name)
    assert notebooks and not silent, f'no check that runs in {silent}'
