"""Record the levels of another player's notes: soundfont_reference.json. Needs libfluidsynth 2 and `pip install pyfluidsynth`.

python tests/data/record_soundfont.py
"""
import ctypes, hashlib, json
from pathlib import Path

import fluidsynth
import numpy as np

from disentangle_nb.data.soundfont import SPANS, band_levels, find_soundfont

NOTES = {'Alto-Saxophone': (65, 56, 73), 'Violin': (40, 64, 91), 'Flute': (73, 67, 88), 'French-Horn': (60, 42, 68), 'Clarinet-Bb': (71, 58, 85),
         'Violoncello': (42, 45, 73), 'Trombone': (57, 42, 66), 'Piano': (0, 38, 90), 'Bassoon': (70, 42, 66), 'Oboe': (68, 64, 84),
         'Trumpet': (56, 60, 79), 'Viola': (41, 56, 82), 'Accordion': (21, 47, 87)}
SR = 44100


class Player:
    "FluidSynth without effects, its best interpolation, in floats."
    def __init__(self):
        self.synth = fluidsynth.Synth(gain=.5, samplerate=SR)
        for k in ('synth.reverb.active', 'synth.chorus.active'): self.synth.setting(k, 0)
        self.font = self.synth.sfload(str(find_soundfont()))
        lib = fluidsynth._fl
        lib.fluid_synth_set_interp_method.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        lib.fluid_synth_set_interp_method(self.synth.synth, -1, 7)
        self.write = lib.fluid_synth_write_float
        self.write.argtypes = [ctypes.c_void_p, ctypes.c_int] + [ctypes.c_void_p, ctypes.c_int, ctypes.c_int] * 2

    def samples(self, n):
        x = np.zeros((2, n), np.float32)
        self.write(self.synth.synth, n, x[0].ctypes.data, 0, 1, x[1].ctypes.data, 0, 1)
        return x.mean(0)

    def note(self, program, key, velocity):
        self.synth.system_reset()
        self.samples(64 * 690)  # One second, so that the last note has died
        self.synth.program_select(0, self.font, 0, program)
        self.synth.noteon(0, key, velocity)
        held, all_ = (int(s * SR) // 64 * 64 for s in SPANS[-2:])
        x = self.samples(held)
        self.synth.noteoff(0, key)
        return np.concatenate([x, self.samples(all_ - held)])


def main():
    player, notes, levels = Player(), [], []
    for name, (program, *keys) in NOTES.items():
        for key in keys:
            for velocity in (40, 80, 120):
                db = band_levels(player.note(program, key, velocity), SR).astype(float)
                notes.append([name, program, key, velocity])
                levels.append(np.maximum(db, db.max() - 75).round(1).tolist())
    origin = dict(renderer='FluidSynth 2.3.1, gain 0.5, no reverb, no chorus, 7th-order interpolation, 44100 Hz, mean of both channels',
                  soundfont=find_soundfont().name, sha256=hashlib.sha256(find_soundfont().read_bytes()).hexdigest(),
                  licence='the SoundFont is GPL-2 (Tim Brechbill); only levels of bands are kept here',
                  levels='dB of mean mel power per band (64 bands, 30-10000 Hz) and span of time, at most 75 dB below the largest of the note',
                  spans=list(SPANS), key='released at 2 s of 2.5 s', recorder='tests/data/record_soundfont.py')
    text = json.dumps(dict(origin=origin, notes=notes, levels=levels), separators=(',', ':'))
    (Path(__file__).parent/'soundfont_reference.json').write_text(text + '\n')


if __name__ == '__main__': main()
