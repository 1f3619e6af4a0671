import glob
import os
import time

import train


def test_what_killed_writers_left_is_removed_and_living_ones_are_not_disturbed(written, configure):
    cfg = configure(written)
    train.main(0, cfg)
    (folder,) = glob.glob(f"{cfg.paths.cache_dir}/features/*")
    for name, age in (("old.npy.0.part", 100), ("young.npy.1.part", 0)):
        open(f"{folder}/{name}", "w").close()
        os.utime(f"{folder}/{name}", (time.time() - age,) * 2)
    train.main(0, cfg)
    left = [os.path.basename(path) for path in glob.glob(f"{folder}/*.part")]
    assert left == ["young.npy.1.part"]
