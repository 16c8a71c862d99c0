"""Images listed in text tables or held by Parquet and Arrow files: columns, labels, splits."""

import io
import json
import os
import unicodedata

import numpy as np
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from pictures import open_data, save, smooth_picture
from refusals import refusal

from datasets.rows import source_of_rows, split_rows
from datasets.table import table


def labels_of(split, source):
    return [source.class_names[label] for label in split.labels.tolist()]


def png(seed):
    buffer = io.BytesIO()
    smooth_picture(8, 8, seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


class Numbers(list):
    """The numbers of rows, where images would be."""

    def subset(self, rows):
        return rows


def rows_source(labels, splits=None, val_split=None, **options):
    """The source of rows whose splits are lists of their numbers."""
    splits = splits or ["train"] * (len(labels) - 1) + ["val"]
    return source_of_rows(Numbers, labels, splits, val_split, "it", **options)


class TestSharesOfRows:
    def test_are_the_same_in_every_run_and_in_the_order_of_the_rows(self):
        assert split_rows([0, 1] * 10, "ab", 0.2, "it")[1] == [0, 9, 10, 15]

    def test_give_each_class_an_image_to_validate_on(self, caplog):
        train, val = split_rows([0, 1, 2] * 6, "abc", 0.1, "it")
        assert caplog.messages == ["dataset.val_split: 0.1 of it is 2 images; one for each class is taken"]
        assert (sorted(row % 3 for row in val), len(train)) == ([0, 1, 2], 15)

    @pytest.mark.parametrize(("labels", "share"), [([0, 0, 1], 0.1), ([0] * 1000 + [1] * 2, 0.1)])
    def test_of_too_few_images_are_one_line(self, labels, share):
        line = refusal(split_rows, labels, "ab", share, "it")
        assert line.startswith(f"dataset.val_split: {share} of it does not leave every class images on both sides: ")
        assert f"'b' has {labels.count(1)}; " in line


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "names", "is_joined"),
        [
            (["dog", "cat", "dog", "cat"], ("cat", "dog"), False),
            (["11", "7", "9", "7"], ("7", "9", "11"), False),
            ([0.0, 10.0, 2.0, 10.0], ("0", "2", "10"), False),
            (["b", "10", "9", "b"], ("9", "10", "b"), False),
            (["a", "0.5", "a", "a"], ("0.5", "a"), False),
            (["cat", "cat ", "dog", "cat"], ("cat", "dog"), True),
            (["é", unicodedata.normalize("NFD", "é"), "dog", "dog"], ("dog", "é"), True),
            (["0", "0.0", "00", "1", "1"], ("0", "1"), True),
            ([1, "1", 0, 1], ("0", "1"), True),
        ],
    )
    def test_are_sorted_numbers_by_their_value_and_one_line_says_which_are_joined(
        self, labels, names, is_joined, caplog
    ):
        assert rows_source(labels).class_names == names
        lines = [line for line in caplog.messages if line.startswith("it: one class each: ")]
        assert len(lines) == is_joined
        assert not is_joined or repr(labels[1]) in lines[0] or ascii(labels[1]) in lines[0]

    @pytest.mark.parametrize("nothing", ["", " ", -1, "-1", "-1.0", None, float("nan")])
    def test_that_are_none_are_left_out_and_counted(self, nothing, caplog):
        source = rows_source(["a", nothing, "b", "a"])
        assert (source.class_names, source.train, source.val) == (("a", "b"), [0, 2], [3])
        assert caplog.messages == ["it: 1 of 4 images have no label (empty or -1) and are left out"]

    def test_that_are_none_may_stand_beside_names_of_classes(self):
        source = rows_source([0, -1, 1, 0], class_names=["no", "yes"])
        assert (source.class_names, source.train, source.val) == (("no", "yes"), [0, 2], [3])

    def test_of_folders_stay_words(self):
        assert rows_source(["10", "2", "02", "2"], numbers=False).class_names == ("02", "10", "2")

    @pytest.mark.parametrize("label", [0.5, float("inf")])
    def test_may_be_no_fractions(self, label):
        assert "must be words or whole numbers" in refusal(rows_source, [0.0, label, 1.0])


class TestSplits:
    @pytest.mark.parametrize(
        ("splits", "val_split", "val", "test"),
        [
            (["train"] * 10 + ["val"] * 6 + ["test"] * 4, None, list(range(10, 16)), [16, 17, 18, 19]),
            (["train"] * 18 + ["val", "test"], None, [18], [19]),
            (["train"] * 10 + ["test"] * 10, None, list(range(10, 20)), None),
            (["train"] * 10 + ["test"] * 10, 0.2, [7, 8], list(range(10, 20))),
        ],
    )
    def test_without_val_a_share_or_test_validates(self, splits, val_split, val, test):
        source = rows_source(["a", "b"] * 10, splits, val_split)
        assert (source.val, source.test) == (val, test)
        assert sorted([*source.train, *source.val, *(source.test or [])]) == list(range(20))

    def test_have_to_be_there(self):
        assert "the split of no image is train" in refusal(rows_source, ["a", "b"] * 10, ["val"] * 20)

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_hold_only_classes_that_are_trained(self, split):
        line = refusal(rows_source, ["a", "b", "owl", "a"], ["train", "train", split, "val"])
        assert line == f"it: no training images of class owl, which {split} has"


WORDS, SPLITS = ["cat", "dog"] * 5, ["train"] * 6 + ["val"] * 4


def store(path, columns):
    """Columns as a table in the format that the ending says; whatever text it is, with commas if they are not said."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.name == "stream.arrow":
        rows = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(str(path), rows.schema) as stream:
            stream.write_table(rows)
    elif path.suffix == ".arrow":
        pyarrow.feather.write_feather(pyarrow.table(columns), path, compression="uncompressed")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), path)
    else:
        pandas.DataFrame(columns).to_csv(path, index=False, sep={".tsv": "\t", ".txt": ";"}.get(path.suffix, ","))
    return path


@pytest.fixture
def files(tmp_path):
    """Ten pictures in files; what a text calls them."""
    return [save(smooth_picture(8, 8, seed=k), tmp_path / f"{k}.png").name for k in range(10)]


@pytest.fixture
def content():
    structs = [{"bytes": png(k), "path": f"{k}.png"} for k in range(10)]
    return pyarrow.table({"image": structs, "label": [0, 1] * 5, "split": SPLITS})


def shows(split, index, seed):
    return np.array_equal(split.picture(index), smooth_picture(8, 8, seed=seed))


@pytest.mark.parametrize(
    "name", ["t.csv", "t.txt", "t.tsv", "files.parquet", "t.parquet", "t.arrow", "words.parquet", "stream.arrow"]
)
def test_every_kind_of_table_gives_the_same(tmp_path, files, name):
    images = [png(k) for k in range(10)]
    kinds = {
        "t.parquet": {"img": [{"bytes": image, "path": ""} for image in images], "fine_label": WORDS, "split": SPLITS},
        "t.arrow": {"image": images, "label": WORDS, "split": SPLITS},
        "stream.arrow": {"image": images, "label": WORDS, "split": SPLITS},
        "words.parquet": {
            "image": pyarrow.array(images, pyarrow.large_binary()),
            "label": pyarrow.array(WORDS, pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
            "split": SPLITS,
        },
    }
    source = table(store(tmp_path / name, kinds.get(name, {"path": files, "label": WORDS, "split": SPLITS})))
    assert source.class_names == ("cat", "dog")
    assert labels_of(source.train, source) == ["cat", "dog"] * 3
    assert (len(source.val), source.test) == (4, None)
    assert shows(source.val, 1, seed=7)


def test_missing_parts_of_a_table_are_counted(tmp_path, content, caplog):
    for number in (0, 2):
        store(tmp_path / f"train-0000{number}-of-00003.parquet", content)
    store(tmp_path / "val-00000-of-00001.parquet", content)
    table(tmp_path)
    assert caplog.messages == [f"{tmp_path / 'train'}: 2 of its 3 parts are there"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_text_as_pandas_and_excel_write_it(tmp_path, files, encoding):
    labels = [0.0, 1.0, None, 10.0, 2.0, 0.0, 1.0, 10.0, 2.0, 1.0]
    frame = pandas.DataFrame({"Image": files, " Label": labels, "Split": SPLITS})
    frame.to_csv(tmp_path / "images.csv", encoding=encoding)
    source = table(tmp_path / "images.csv")
    assert source.class_names == ("0", "1", "2", "10")
    assert labels_of(source.train, source) == ["0", "1", "10", "2", "0"]


def test_a_text_that_is_no_utf_8_is_read_as_excel_writes_it(tmp_path, caplog):
    rows = ["path;label", "bär.png;Bär", "kuh.png;Kuh", "a.png;Kuh", "b.png;Bär"]
    (tmp_path / "t.csv").write_bytes("\n".join(rows).encode("cp1252"))
    source = table(tmp_path / "t.csv", val_split=0.5)
    assert source.class_names == ("Bär", "Kuh")
    assert caplog.messages == [f"{tmp_path / 't.csv'}: is no UTF-8, so it is read as Windows-1252"]


def test_columns_may_be_named(tmp_path, files):
    path = store(tmp_path / "t.csv", {"where": files, "what": WORDS, "label": "x", "split": SPLITS})
    assert "no column is called image or img or path; dataset.image_column names one of where" in refusal(table, path)
    assert "no column is called who; dataset.image_column names one of where, what" in refusal(
        table, path, image_column="who"
    )
    assert table(path, image_column="where", label_column="what").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,cat,night", "split 'night', must be one of train, "),
        ("", "holds no images"),
        ("a.png,cat,train,more", "t.csv failed: ParserWarning: "),
        ("\udc81.png,cat,train", "t.csv failed: UnicodeDecodeError: "),
    ],
)
def test_a_wrong_line_of_a_text_is_one_line(tmp_path, line, message):
    (tmp_path / "t.csv").write_text(f"path,label,split\n{line}\n", errors="surrogateescape")
    assert message in refusal(table, tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["label"]), "no column is called label or labels or class"),
        (lambda t: t.set_column(0, "image", [[1] * 10]), "Unsupported cast from int64 to large_binary"),
        (lambda t: t.set_column(1, "label", [[0.5] * 10]), "found the label 0.5, must be words or whole numbers"),
        (lambda t: t.set_column(1, "label", [[[1]] * 10]), "images.parquet failed: TypeError: unhashable"),
        (lambda t: t.set_column(2, "split", [[None, *["train"] * 9]]), "split None, must be one of"),
    ],
)
def test_a_wrong_column_of_a_table_is_one_line(tmp_path, content, change, message):
    assert message in refusal(table, store(tmp_path / "images.parquet", change(content)))


def test_an_image_with_two_labels_is_named(tmp_path, files, caplog):
    columns = {"path": [*files, files[0]], "label": [*WORDS, "dog"], "split": [*SPLITS, "train"]}
    open_data("csv", store(tmp_path / "t.csv", columns), loader="stream", img_h=8)
    assert (
        f"{tmp_path / files[0]}: has two labels among the training images, and perhaps others have" in caplog.messages
    )


def test_a_file_that_is_not_there_is_refused_before_the_run_begins(tmp_path, files):
    columns = {"path": [*files, "nowhere.png", ""], "label": [*WORDS, "cat", "cat"], "split": [*SPLITS, "val", "val"]}
    path, keys = store(tmp_path / "t.csv", columns), {"loader": "stream", "img_h": 8}
    assert refusal(open_data, "csv", path, **keys) == (
        f"{tmp_path / 'nowhere.png'}: is no file (2 of 6 validation images are missing); "
        "dataset.on_corrupt=skip leaves such images out"
    )
    assert open_data("csv", path, on_corrupt="skip", **keys).val.num_samples == 4
    elsewhere = store(tmp_path / "below/t.csv", columns)
    assert "(6 of 6 training images are missing); a table's paths" in refusal(open_data, "csv", elsewhere, **keys)


def test_a_pipe_no_file_and_no_table_are_refused(tmp_path):
    (tmp_path / "images.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "empty").mkdir()
    for name in ("pipe.csv", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
    for name, end in {
        "images.parquet": "images.parquet failed: ",
        "empty": "holds no .parquet, .arrow",
        "pipe.csv": "pipe.csv: is a folder, a link, a pipe or a device, expected a file",
        "pipe.parquet": "pipe.parquet: is a folder, a link, a pipe or a device, expected a file",
        "missing.csv": "missing.csv failed: No such file or directory",
    }.items():
        assert end in refusal(table, tmp_path / name)


def test_class_names_are_those_that_hugging_face_writes(tmp_path, content):
    features = {"label": {"names": ["no", "yes", "perhaps"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    source = table(store(tmp_path / "t.parquet", content.replace_schema_metadata(metadata)))
    assert source.class_names == ("no", "yes", "perhaps")
    assert source.train.labels.tolist() == [0, 1] * 3


def test_a_folder_is_split_by_the_names_of_its_files_and_folders(tmp_path, content):
    content = content.drop_columns(["split"])
    store(tmp_path / "train-00000.parquet", content.slice(0, 5))
    images = pyarrow.array([png(k) for k in (5, 6, 7)], pyarrow.binary())  # of another type
    store(tmp_path / "validation-00000.parquet", {"image": images, "label": ["1", "0", "1"]})
    store(tmp_path / "TEST/0.parquet", content.slice(8))
    for hidden in ("._train-00000.parquet", ".cache/train-1.parquet", "__MACOSX/train-2.parquet"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"what systems leave")
    source = table(tmp_path)
    assert [len(part) for part in (source.train, source.val, source.test)] == [5, 3, 2]
    assert source.val.labels.tolist() == [1, 0, 1]
    assert shows(source.val, 0, seed=5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("small/train-0", "large/train-0"), "holds several data sets, large, small; name the folder of one"),
        (("train-0", "more-0"), "says of some images only to which split they belong"),
    ],
)
def test_a_folder_of_several_data_sets_or_of_no_known_split_is_refused(tmp_path, content, names, message):
    for name in names:
        store(tmp_path / f"{name}.parquet", content.drop_columns(["split"]))
    assert message in refusal(table, tmp_path, val_split=0.2)


def test_an_image_that_is_none_is_named_and_can_be_left_out(tmp_path, content):
    images = [{"bytes": {2: None, 3: b"no image"}.get(k, png(k)), "path": ""} for k in range(10)]
    source = table(store(tmp_path / "images.parquet", content.set_column(0, "image", [images])))
    for row in (2, 3):
        assert f"images.parquet row {row}: cannot be read as an image" in refusal(source.train.picture, row)
    rest = source.train.subset([0, 1, 2, 4, 5])
    assert shows(rest, 3, seed=4)
    assert rest.labels.tolist() == [0, 1, 0, 0, 1]
