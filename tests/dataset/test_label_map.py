import pytest

from dataset.label_map import read_label_map
from utils.errors import UserError

NAMES = ["run", "air drumming", "walk"]
FORMS = {
    "names": ("run\nair drumming\nwalk\n", ""),
    "numbers first": ("0 run\n1 air drumming\n2 walk\n", ""),
    "numbers in another order": ("2 walk\n0 run\n1 air drumming\n", ""),
    "a csv with a header": ("id,name\n0,run\n1,air drumming\n2,walk\n", ""),
    "a quoted csv": ('"id","name"\n0,"run"\n1,"air drumming"\n2,"walk"\n', ""),
    "names first": ("name,id\nrun,0\nair drumming,1\nwalk,2\n", ""),
    "tabs": ("0\trun\n1\tair drumming\n2\twalk\n", ""),
    "semicolons": ("id;name\n0;run\n1;air drumming\n2;walk\n", ""),
    "colons": ("0: run\n1: air drumming\n2: walk\n", ""),
    "one column with a header": ("name\nrun\nair drumming\nwalk\n", "its first line, `name`, is taken for a header"),
    "quoted names": ('"run"\n"air drumming"\n"walk"\n', ""),
    "comments": ("# my classes\nrun\n\nair drumming\n# the last\nwalk\n", "2 lines that begin with # are left out"),
    "json of names": ('["run", "air drumming", "walk"]', ""),
    "json of numbers": ('{"walk": 2, "run": 0, "\\"air drumming\\"": 1}', ""),
    "json by number": ('{"10": "x", "0": "run"}'.replace('"10": "x"', '"2": "walk", "1": "air drumming"'), ""),
    "windows": ("\ufeff0 run\r\n1 air drumming\r\n2 walk\r\n", ""),
}


@pytest.mark.parametrize("text, note", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_names_in_the_order_of_their_labels(tmp_path, capsys, text, note):
    file = tmp_path / ("map.json" if text.startswith(("[", "{")) else "map.txt")
    file.write_bytes(text.encode())
    assert read_label_map(file) == NAMES
    out = capsys.readouterr().out
    assert (note in out) if note else not out


def test_more_than_ten_numbers_are_ordered_as_numbers(tmp_path):
    (tmp_path / "map.json").write_text("{" + ", ".join(f'"{number}": "c{number}"' for number in range(12)) + "}")
    assert read_label_map(tmp_path / "map.json") == [f"c{number}" for number in range(12)]


PLAIN = {
    "numbers within names": ["1 finger", "fist", "2 fingers"],
    "numbers at the end": ["stage 1", "stage 2", "stage 0"],
    "a number of many digits": ["run", "9" * 5000 + " walk"],
    "numbers alone": ["0", "1", "2"],
    "commas": ["passing American football (in game)", "massaging person's head", "hair, cutting of"],
    "brackets": ["[unknown]", "run"],
}


@pytest.mark.parametrize("names", PLAIN.values(), ids=PLAIN.keys())
def test_names_are_taken_as_they_are(tmp_path, capsys, names):
    (tmp_path / "map.txt").write_text("\n".join(names))
    assert read_label_map(tmp_path / "map.txt") == names and not capsys.readouterr().out


REFUSED = {
    "twice": ("run\nwalk\nrun\n", r"the class `run` comes 2 times"),
    "twice with numbers": ("0 run\n1 walk\n2 run\n", r"the class `run` comes 2 times"),
    "from 1": (
        "1 run\n2 walk\n",
        r"each number from 0 to 1 once, as labels count from 0, found 1, 2; number the names",
    ),
    "a gap": ("0,run\n1,walk\n3,jump\n", r"each number from 0 to 2 once.*found 0, 1, 3"),
    "a number twice": ("id,name\n0,run\n0,walk\n", r"each number from 0 to 1 once.*found 0, 0"),
    "nothing": ("\n# nothing\n", r"expected a class name a line, found none"),
    "a header alone": ("name\n", r"expected a class name a line, found none"),
    "broken json": ('{"run": 0,', r"expected JSON of class names and their numbers"),
    "other json": ('{"run": {"id": 0}}', r"expected JSON of class names and their numbers"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_map_that_would_shift_classes_is_refused(tmp_path, text, message):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_label_map(tmp_path / "map.txt")
    assert caught.value.about == "label_map" and "\n" not in str(caught.value)


def test_a_name_that_is_not_in_utf8_is_refused(tmp_path):
    (tmp_path / "map.txt").write_bytes("run\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"the class 'caf\\udce9' is not in UTF-8; save the file as UTF-8"):
        read_label_map(tmp_path / "map.txt")
