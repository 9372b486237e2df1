"The GMVAE feature release in its true layout, made of a few bytes a note."
import numpy as np, torch

from disentangle_nb.data.notes import RELEASE_CLASSES, pitch_name

RANGES = dict(zip(RELEASE_CLASSES, [(52, 83), (31, 77), (22, 82), (52, 86), (21, 102), (55, 100), (36, 84), (49, 81), (34, 77), (50, 95), (59, 98), (58, 93)]))
NOTES = {  # prefix counts that give the published totals, class by class, and (floor of a tenth each) the published validation counts
    'EH_nA': 128, 'Hn': 195, 'Corf': 14, 'Corm': 5, 'trbt': 63, 'TpC': 150, 'trof': 17, 'trom': 17, 'trop': 10, 'Pno': 246, 'Vn': 138, 'Vc': 147,
    'ASax': 99, 'Bn': 199, 'fagf': 28, 'fagm': 14, 'fagp': 10, 'ClBb': 95, 'clbb': 85, 'Fl': 118, 'Ob': 107}
LO, HI = -36., 8.


def _spectrum(cls, midi, dynamics):
    "Natural log of the mel power of a made-up note, (1, 256, 43): a slope for the instrument, partials for the pitch."
    band = torch.arange(256.)
    log = LO + 24 - (.02 + .01*cls)*band + 2*dynamics
    for k in (1, 2, 3): log = log + (6 + (cls % 4)*k/2)*torch.exp(-(band - k*(midi - 18))**2/4)
    return log.clamp(LO, HI)[None, :, None].expand(1, 256, 43)


def lay_out(root,              # Folder to fill
            sounding=False,    # Give every note a spectrum; empty files otherwise, but for the range of a few
           ):
    "A folder that looks as the unpacked archive does; 1885 notes."
    for d in ('spec', 'spec-norm'): (root/'data'/d).mkdir(parents=True)
    (root/'__MACOSX'/'data'/'spec-norm').mkdir(parents=True)
    names = {}
    for i, (cls, prefixes) in enumerate(RELEASE_CLASSES.items()):
        lo, hi = RANGES[cls]
        for p in prefixes:
            cells = [(m, d) for d in ('mf', 'ff', 'pp', 'f', 'p') for m in range(lo, hi + 1, 3 if p == 'trbt' else 1)]
            names |= {f'{p}-ord-{pitch_name(m)}-{d}': (i, m, ('pp', 'p', 'mf', 'f', 'ff').index(d)) for m, d in cells[:NOTES[p]]}
    for i, n in enumerate(np.random.RandomState(0).permutation(list(names))):
        norm = root/'data'/'spec-norm'/f'{n}-N-normalize.pth'
        log = _spectrum(*names[n]) if sounding else torch.full((1, 256, 43), float(i))
        if sounding: torch.save(2*(log - LO)/(HI - LO) - 1, norm)
        else: norm.touch()
        if sounding or i < 40: torch.save(log, root/'data'/'spec'/f'{n}-N.pth')
    (root/'data'/'spec-norm'/'._Vn-ord-A4-mf-N-normalize.pth').write_bytes(b'\0\5\x16\7')
    (root/'data'/'spec-norm'/'.DS_Store').touch()
    order = sorted(names)  # an independent reading of the reference's protocol, with the old global generator
    idx, state = [], np.random.get_state()
    for p in sorted(set(n.split('-')[0] for n in names)):
        rows = np.array([i for i, n in enumerate(order) if n.split('-')[0] == p])
        np.random.seed(1111)
        idx += np.random.choice(rows, int(.1*len(rows)), replace=False).tolist()
    np.random.set_state(state)
    np.save(root/'data'/'valid_idx.npy', np.array(idx))
    return root
