"""Takes out of the environment what would change the tests. Imported before nnU-Net, which reads its variables then."""

import os

from nnunet_nmsw._register import register

for name in [name for name in os.environ if name.startswith(("nnUNet_", "TORCH_FORCE_"))]:
    del os.environ[name]
register()  # as at the start of every interpreter
os.environ["RAY_ADDRESS"] = "local"  # not a cluster that happens to run here
os.environ["PYTHONUTF8"] = "1"  # of processes that tests start
