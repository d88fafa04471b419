import os
import subprocess
import sys

from nnunet_nmsw._register import PLUGIN_FOLDER

PRINT_VARIABLE = [sys.executable, "-c", "import os; print(os.environ['nnUNet_extTrainer'])"]


def variable(**environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"}
    result = subprocess.run(PRINT_VARIABLE, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return result.stdout.strip().split(os.pathsep)


def test_a_shell_without_the_variable_gets_our_folder():
    assert variable() == [PLUGIN_FOLDER]
    assert variable(nnUNet_extTrainer="") == [PLUGIN_FOLDER]


def test_the_users_own_folder_stays_first_and_ours_comes_once():
    assert variable(nnUNet_extTrainer="/mine") == ["/mine", PLUGIN_FOLDER]
    assert variable(nnUNet_extTrainer=f"/mine{os.pathsep}{PLUGIN_FOLDER}") == ["/mine", PLUGIN_FOLDER]


def test_starting_python_imports_nothing_heavy():
    code = "import sys; print([m for m in ('torch', 'numpy', 'nnunetv2') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nnunet_finds_our_trainers_and_the_users(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class MyTrainer(nnUNetTrainer): pass\n"
    )
    names = ["nnUNetTrainerNMSW", "MyTrainer", "nnUNetTrainerNMSW_1epoch"]
    names += [f"nnUNetTrainerNMSW_{n}epochs" for n in (1, 5, 10, 20, 50, 100, 250, 500, 2000)]
    names += [f"{name}_NoMirroring" for name in names if "NMSW" in name]
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        f"for name in {names}: assert find(name).__name__ == name\n"
    )
    environment = {**os.environ, "nnUNet_extTrainer": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
