"Sweeps: each card once, the same bits in parallel, and every way of dying survived."
import os, signal, subprocess, sys, threading, time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
import joblib, pytest, torch
from disentangle_nb.core import CardError, RunCard, read_json, seed_everything, write_json
from disentangle_nb.training import sweep as module
from disentangle_nb.training.sweep import SweepError, failure_path, grid, limit_threads, read_result, read_results, result_path, run_card, share_cores, sweep

PATIENCE = 150 # s that anything may take on a slow machine
here = Path(__file__).resolve().parent
quiet = pytest.mark.filterwarnings('ignore:a worker died', 'ignore:.*A worker stopped while some jobs')


@dataclass(frozen=True)
class Card(RunCard):
    beta:float = 1.
    seed:int = 0
    sizes:tuple[int, ...] = (8, 4)
    weights:dict[str, float] = field(default_factory=lambda: dict(recon=1.))


def note(diary, what, card): (diary/f'{what} {card.seed} {os.getpid()} {time.monotonic_ns()}').touch()


def noted(diary, what):
    "seed -> how often."
    return Counter(int(p.name.split()[1]) for p in diary.iterdir() if p.name.startswith(what))


def train(card, diary=None):
    "A seeded training that any difference in threads, order or randomness would change."
    if diary: note(diary, 'begun', card)
    seed_everything(card.seed)
    x, model = torch.randn(64, 8), torch.nn.Sequential(torch.nn.Linear(8, card.sizes[0]), torch.nn.Tanh(), torch.nn.Linear(card.sizes[0], 8))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss = card.beta*((model(x + .1*torch.randn_like(x)) - x)**2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
    return dict(loss=loss, weights=dict(norm=torch.cat([p.flatten() for p in model.parameters()]).norm()), curve=[1, 2])


def waits(card, diary):
    "Seeds 0 and 1 end at once; the others when they are told to go."
    note(diary, 'begun', card)
    end = time.monotonic() + PATIENCE
    while card.seed > 1 and not (diary/'go').exists():
        if time.monotonic() > end: raise TimeoutError('nobody said go')
        time.sleep(.02)
    note(diary, 'ended', card)
    return dict(seed=card.seed)


def stumbles(card, diary):
    note(diary, 'begun', card)
    if card.seed == 1 and not (diary/'mended').exists(): raise RuntimeError('silence has no pitch')
    return dict(seed=card.seed)


def dies(card, diary, often=1):
    "Seed 1 takes its worker with it, so many times."
    note(diary, 'begun', card)
    if card.seed == 1 and noted(diary, 'begun')[1] <= often: os.kill(os.getpid(), signal.SIGKILL)
    return dict(seed=card.seed)


def looks(card):
    from threadpoolctl import threadpool_info
    return dict(torch=torch.get_num_threads(), env=os.environ['OMP_NUM_THREADS'], pools=max((p['num_threads'] for p in threadpool_info()), default=0))


def until(condition, what):
    "Wait for a condition, not for a time."
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f'waited {PATIENCE} s for {what}'
        time.sleep(.02)


@pytest.fixture
def diary(tmp_path):
    (tmp_path/'diary').mkdir()
    return tmp_path/'diary'


def results(folder): return sorted(p.name for p in folder.glob('*.json'))


def test_parallel_equals_a_plain_loop(tmp_path):
    cards = grid(Card(), beta=[1, 4], seed=range(3))
    with limit_threads(1): plain = [train(c) for c in cards]
    plain = [dict(loss=r['loss'].item(), weights=dict(norm=r['weights']['norm'].item()), curve=[1, 2]) for r in plain]
    assert sweep(train, cards, tmp_path/'two', n_jobs=2, threads=1) == plain
    assert sweep(train, cards[::-1], tmp_path/'one', n_jobs=1, threads=1) == plain[::-1]
    assert results(tmp_path/'one') == results(tmp_path/'two') and len(results(tmp_path/'two')) == 6
    assert len({r['loss'] for r in plain}) == 6


def test_a_finished_card_is_never_run_again(tmp_path, diary):
    fn, cards = partial(train, diary=diary), grid(Card(), seed=range(3))
    first = sweep(fn, cards, tmp_path/'out', n_jobs=2)
    assert sweep(fn, cards, tmp_path/'out', n_jobs=2) == first
    assert sweep(fn, grid(Card(), seed=range(5)), tmp_path/'out', n_jobs=1)[:3] == first
    assert noted(diary, 'begun') == {i: 1 for i in range(5)}
    assert not list((tmp_path/'out').rglob('.*')) and not (tmp_path/'out'/'begun').exists()


def test_a_damaged_result_is_set_aside_and_made_again(tmp_path, diary):
    fn, cards = partial(train, diary=diary), grid(Card(), seed=range(3))
    first = sweep(fn, cards, tmp_path/'out', n_jobs=1)
    a, b = (result_path(tmp_path/'out', c) for c in cards[:2])
    a.write_bytes(a.read_bytes()[:50]); write_json(b, {'result': 3})
    with pytest.warns(UserWarning) as said: assert sweep(fn, cards, tmp_path/'out', n_jobs=1) == first
    assert {p.name for w in said for p in (a, b) if p.name in str(w.message)} == {a.name, b.name}
    assert noted(diary, 'begun') == {0: 2, 1: 2, 2: 1}
    assert {p.name for p in (tmp_path/'out').iterdir()} == {*results(tmp_path/'out'), a.with_suffix('.damaged').name, b.with_suffix('.damaged').name}


def test_somebody_elses_results_are_refused(tmp_path):
    cards = grid(Card(), seed=range(2))
    sweep(train, cards[:1], tmp_path, n_jobs=1)
    with pytest.raises(SweepError, match='made by train, not by looks'): sweep(looks, cards[:1], tmp_path, n_jobs=1)
    result_path(tmp_path, cards[1]).write_bytes(result_path(tmp_path, cards[0]).read_bytes())
    with pytest.raises(SweepError, match='another card.*"seed": 0'): sweep(train, cards, tmp_path, n_jobs=1)


@pytest.mark.parametrize('n_jobs', [1, 2])
def test_a_failure_does_not_stop_the_others(tmp_path, diary, n_jobs):
    fn, cards = partial(stumbles, diary=diary), grid(Card(), seed=range(4))
    with pytest.raises(SweepError, match=r'(?s)1 of 4 cards failed.*seed=1: RuntimeError: silence has no pitch'): sweep(fn, cards, tmp_path/'out', n_jobs=n_jobs)
    assert len(results(tmp_path/'out')) == 3
    kept = read_json(failure_path(tmp_path/'out', cards[1]))
    assert kept['card'] == cards[1].to_dict() and 'in stumbles' in ''.join(kept['traceback'])
    with pytest.warns(UserWarning, match='1 of 4'): some = sweep(fn, cards, tmp_path/'out', n_jobs=n_jobs, strict=False)
    assert some == [dict(seed=0), None, dict(seed=2), dict(seed=3)]
    (diary/'mended').touch()
    assert sweep(fn, cards, tmp_path/'out', n_jobs=n_jobs) == [dict(seed=i) for i in range(4)]
    assert noted(diary, 'begun') == {0: 1, 1: 3, 2: 1, 3: 1}
    assert not failure_path(tmp_path/'out', cards[1]).exists()


def test_what_json_cannot_hold_is_a_failure_too(tmp_path):
    assert run_card(lambda card: dict(a={1, 2}), Card(), tmp_path).startswith('TypeError: JSON holds')
    assert 'return a dict of results; got Tensor' in run_card(lambda card: torch.zeros(2), Card(), tmp_path)
    assert not results(tmp_path)


def test_a_full_disk_is_nobodys_failure(tmp_path, monkeypatch):
    def full(path, obj): raise OSError(28, 'disk full')
    monkeypatch.setattr(module, 'write_json', full)
    with pytest.raises(OSError, match='disk full'): sweep(train, [Card()], tmp_path, n_jobs=1)
    assert not (tmp_path/'begun').exists()


script = '''
from functools import partial; from pathlib import Path; import test_sweep as t
t.sweep(partial(t.waits, diary=Path({diary!r})), t.grid(t.Card(), seed=range(6)), {out!r}, n_jobs=2)
'''


@contextmanager
def program(*args, env=None):
    "A process with its children in a group of its own, ended whatever happens."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')]), **(env or {})}
    p = subprocess.Popen([sys.executable, *map(str, args)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a suite begun in the background ignores it, and so would this
    reader = threading.Thread(target=lambda: setattr(p, 'said', p.stderr.read()), daemon=True) # a full pipe would stop it
    reader.start()
    try: yield p
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        p.wait(); reader.join(10); p.stderr.close()


def busy(diary, n=2):
    "Are the first two cards done, and `n` others begun?"
    return sum(noted(diary, 'ended').values()) == 2 and sum(noted(diary, 'begun').values()) == 2 + n


@pytest.mark.parametrize('by', [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_struck_down_goes_on_where_it_was(tmp_path, diary, by):
    out = tmp_path/'out'
    with program('-c', script.format(diary=str(diary), out=str(out))) as p:
        until(lambda: busy(diary) and len(results(out)) == 2 or p.poll() is not None, 'two cards to end and two to begin')
        os.killpg(p.pid, by)
        assert p.wait(PATIENCE) != 0
    assert not list(out.glob('.*')) and len(results(out)) == 2
    struck = set(noted(diary, 'begun')) - set(noted(diary, 'ended'))
    (diary/'go').touch()
    assert sweep(partial(waits, diary=diary), grid(Card(), seed=range(6)), out, n_jobs=2) == [dict(seed=i) for i in range(6)]
    assert noted(diary, 'begun') == {i: 1 + (i in struck) for i in range(6)} and len(struck) >= 2 # interrupted workers may begin another
    assert noted(diary, 'ended') == {i: 1 for i in range(6)}
    assert not (out/'begun').exists()


def test_two_sweeps_in_one_folder(tmp_path, diary):
    (diary/'go').touch()
    code = script.format(diary=str(diary), out=str(tmp_path/'out'))
    with program('-c', code) as a, program('-c', code) as b: assert (a.wait(PATIENCE), b.wait(PATIENCE)) == (0, 0), (a.said, b.said)
    assert len(read_results(tmp_path/'out', grid(Card(), seed=range(6)))) == len(results(tmp_path/'out')) == 6
    assert not list((tmp_path/'out').glob('.*'))


@quiet
def test_a_worker_that_dies_costs_nobody_anything(tmp_path, diary):
    assert sweep(partial(dies, diary=diary), grid(Card(), seed=range(4)), tmp_path/'out', n_jobs=2) == [dict(seed=i) for i in range(4)]
    assert noted(diary, 'begun')[1] == 2


@quiet
def test_a_card_that_kills_every_worker_is_found_out(tmp_path, diary):
    with pytest.raises(SweepError, match=r'(?s)1 of 4 cards failed.*seed=1: its worker died when it ran alone'):
        sweep(partial(dies, diary=diary, often=99), grid(Card(), seed=range(4)), tmp_path/'out', n_jobs=2)
    assert len(results(tmp_path/'out')) == 3 and noted(diary, 'begun')[1] == 2


def test_threads_inside_workers(tmp_path):
    assert sweep(looks, grid(Card(), seed=range(2)), tmp_path/'a', n_jobs=joblib.cpu_count()) == [dict(torch=1, env='1', pools=1)]*2
    told = sweep(looks, grid(Card(), seed=range(2)), tmp_path/'b', n_jobs=2, threads=3)
    assert [(r['torch'], r['env']) for r in told] == [(3, '3')]*2
    before = torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS')
    sweep(looks, [Card()], tmp_path/'c', n_jobs=1, threads=2)
    assert (torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS')) == before
    assert read_result(tmp_path/'b', Card())['provenance']['threads'] == 3


def test_how_cores_are_shared(monkeypatch):
    monkeypatch.setattr(joblib, 'cpu_count', lambda: 8)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    assert [share_cores(n) for n in (None, 8, 4, 3, 1, -2, 99)] == [(-1, 1), (8, 1), (4, 2), (3, 2), (1, 8), (-2, 1), (99, 1)]
    with joblib.parallel_config(n_jobs=2): assert (share_cores(), share_cores(-1)) == ((2, 4), (-1, 1))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1) # as OMP_NUM_THREADS=1 would
    assert share_cores(2) == (2, 1)


def test_threads_as_workers_are_refused(tmp_path):
    from joblib._parallel_backends import SequentialBackend
    class Cluster(SequentialBackend):
        class client:
            def nthreads(): return dict(a=1, b=2)
    for backend in ('threading', Cluster()):
        with joblib.parallel_config(backend), pytest.raises(SweepError, match='random numbers'): sweep(train, [Card()], tmp_path)


def test_grids():
    assert grid(Card()) == [Card()]
    assert [c.seed for c in grid(Card(), seed=torch.arange(3))] == [0, 1, 2]
    assert grid(Card(), sizes=[(8, 4), [16]])[1].sizes == (16,)
    for fault, said in {'unknown': (dict(seeds=[1]), "did you mean 'seed'"), 'type': (dict(seed=[1.5]), 'seed should be int'), 'scalar': (dict(seed=1), 'a list of values'),
                        'text': (dict(seed='12'), 'a list of values'), 'twice': (dict(beta=[1, 2, 1.]), r'lists 1.0 twice'), 'none': (dict(seed=[]), 'no values')}.values():
        with pytest.raises(CardError, match=said): grid(Card(), **fault)


def test_one_card_one_name(tmp_path):
    assert len({result_path('.', c) for c in grid(Card(), beta=[1, 2], seed=range(50), weights=[dict(recon=1.), dict(recon=2.)])}) == 200
    assert result_path('.', Card(beta=4, sizes=[8, 4])) == result_path('.', Card().replace(beta=4.))
    name = result_path('.', Card(weights={'a/b': 1., 'c' * 300: 2.})).name
    assert len(name) < 120 and '/' not in name
    with pytest.raises(CardError, match='came twice'): sweep(train, [Card(beta=1), Card()], tmp_path)


def test_tables(tmp_path):
    cards = grid(Card(), beta=[4, 1], seed=range(2))
    sweep(train, cards, tmp_path, n_jobs=1)
    table = read_results(tmp_path, cards)
    assert list(table) == ['beta', 'seed', 'loss', 'weights.norm', 'curve', 'seconds'] and table.beta.tolist() == [4, 4, 1, 1]
    assert read_results(tmp_path).beta.tolist() == [1, 1, 4, 4]
    with pytest.raises(SweepError, match='1 of 5 cards have no result'): read_results(tmp_path, [*cards, Card(beta=9.)])
    broken = result_path(tmp_path, cards[0]); broken.write_text('{"card"')
    with pytest.warns(UserWarning, match=broken.name): assert len(read_results(tmp_path)) == 3
    assert broken.exists() # looking changes nothing
    with pytest.raises(FileNotFoundError, match='run a sweep'): read_results(tmp_path/'nowhere')
    sweep(waits_not, grid(Card(), seed=range(2)), tmp_path/'clash', n_jobs=1)
    assert list(read_results(tmp_path/'clash')) == ['seed', 'result.seed', 'missing', 'seconds']
    assert read_results(tmp_path/'clash').missing.isna().all()


def waits_not(card): return dict(seed=card.seed, missing=float('nan'))


def test_a_folder_that_is_not_shared_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'run_some', lambda *a: True)
    with pytest.raises(SweepError, match='all machines share'): sweep(train, [Card()], tmp_path, n_jobs=1)
    monkeypatch.setattr(module, 'run_some', lambda *a: False)
    with pytest.raises(SweepError, match='before they begin'): sweep(train, [Card()], tmp_path, n_jobs=1)


def test_one_card_of_an_array_job(tmp_path):
    "What a scheduler's array job runs: the exit code tells."
    code = 'import sys; from pathlib import Path; import test_sweep as t; sys.exit(t.run_card(t.{fn}, t.grid(t.Card(), seed=range(3))[int(sys.argv[1])], {out!r}))'
    with program('-c', code.format(fn='train', out=str(tmp_path)), 2) as a, program('-c', code.format(fn='stumbles', out=str(tmp_path)), 1) as b:
        assert (a.wait(PATIENCE), b.wait(PATIENCE)) == (0, 1)
    assert 'TypeError' in b.said and read_result(tmp_path, Card(seed=2))


@contextmanager
def cluster(folder, workers):
    "A scheduler and worker processes, each a program of its own, and a client of it."
    distributed = pytest.importorskip('distributed', reason="needs the extra: pip install 'disentangle_nb[sweep]'")
    at = folder/'scheduler.json'
    def started(kind, *args): return program('-m', f'distributed.cli.dask_{kind}', '--scheduler-file', at, '--no-dashboard', *args)
    common = '--nthreads', 1, '--no-nanny', '--host', '127.0.0.1', '--local-directory', folder
    with started('scheduler', '--host', '127.0.0.1', '--port', 0) as s:
        until(lambda: at.exists() or s.poll() is not None, 'the scheduler')
        with started('worker', *common, '--name', 'a') as a, started('worker', *common, '--name', 'b') as b:
            with distributed.Client(scheduler_file=str(at), timeout=PATIENCE) as client:
                client.wait_for_workers(workers, timeout=PATIENCE)
                yield client, a, b


def strike(diary, victim, struck):
    "When both workers are in the middle of a card, kill one; then let all cards end."
    until(lambda: busy(diary), 'two cards to end and two to begin')
    ended = noted(diary, 'ended')
    struck += [int(p.name.split()[1]) for p in diary.iterdir() if p.name.startswith('begun') and p.name.split()[2] == str(victim.pid) and int(p.name.split()[1]) not in ended]
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    (diary/'go').touch()


def test_dask_with_a_worker_killed(tmp_path, diary):
    cards, struck = grid(Card(), seed=range(8)), []
    with cluster(tmp_path, 2) as (client, a, b):
        killer = threading.Thread(target=strike, args=(diary, a, struck))
        killer.start()
        with joblib.parallel_config(backend='dask', client=client): done = sweep(partial(waits, diary=diary), cards, tmp_path/'out')
        killer.join()
        assert len(client.scheduler_info()['workers']) == 1
        assert len(struck) == 1
        assert done == [dict(seed=i) for i in range(8)]
        assert noted(diary, 'begun') == {i: 1 + (i in struck) for i in range(8)}, 'only the card that was struck down is begun again'
        assert noted(diary, 'ended') == {i: 1 for i in range(8)}
        assert len(read_results(tmp_path/'out', cards)) == len(results(tmp_path/'out')) == 8
        with joblib.parallel_config(backend='dask', client=client): assert sweep(partial(waits, diary=diary), cards, tmp_path/'out') == done
        assert sum(noted(diary, 'begun').values()) == 9
    assert not (tmp_path/'out'/'begun').exists() and not list((tmp_path/'out').glob('.*'))
