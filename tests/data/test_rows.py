"""Images listed in CSV files, in Parquet and Arrow tables, and in folders without a split."""

import csv
import io
import os

import numpy as np
import pytest
from pictures import open_data, refusal, save, smooth_picture

from datasets.csv_table import csv_table
from datasets.imagefolder import imagefolder
from datasets.rows import source_of_rows, split_rows
from utils.errors import UserError


def labels_of(split, source):
    return [source.class_names[label] for label in split.labels.tolist()]


def write_csv(folder, header, rows):
    path = folder / "images.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


class TestSplit:
    def test_takes_the_same_share_of_every_class_and_every_row_once(self):
        labels = [0] * 40 + [1] * 20 + [2] * 10
        train, val = split_rows(labels, 0.1, "it")
        assert sorted(train + val) == list(range(70))
        assert np.bincount([labels[row] for row in val]).tolist() == [4, 2, 1]

    def test_is_the_same_in_every_run_and_in_the_order_of_the_rows(self):
        first, second = (split_rows([0, 1] * 10, 0.2, "it") for _ in range(2))
        assert first == second
        assert first[0] == sorted(first[0])

    def test_gives_each_class_an_image_to_validate_on(self, caplog):
        train, val = split_rows([0, 1, 2] * 6, 0.1, "it")
        assert caplog.messages == ["dataset.val_split: 0.1 of it is 2 images; one for each class is taken"]
        assert (sorted(row % 3 for row in val), len(train)) == ([0, 1, 2], 15)

    @pytest.mark.parametrize(
        ("labels", "share"),
        [([0, 0, 1], 0.1), ([0] * 1000 + [1] * 2, 0.1), ([0] * 1000 + [1] * 2, 0.9)],
    )
    def test_of_too_few_images_is_one_line(self, labels, share):
        line = rf"^dataset\.val_split: {share} of it does not leave every class images on both sides: [^\n]+$"
        with pytest.raises(UserError, match=line):
            split_rows(labels, share, "it")


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path):
        for k in range(20):
            save(smooth_picture(8, 8, seed=k), tmp_path / ("ant" if k % 2 else "bee") / f"{k}.png")
        return tmp_path

    def test_without_a_split_is_divided(self, root):
        source = imagefolder(root, val_split=0.2)
        assert source.class_names == ("ant", "bee")
        assert labels_of(source.val, source) == ["ant"] * 2 + ["bee"] * 2
        assert len(source.train) == 16
        paths = [split.path(k) for split in (source.train, source.val) for k in range(len(split))]
        assert len(set(paths)) == 20

    @pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
    def test_that_is_split_already_is_refused(self, root, name):
        (root / "train").mkdir()
        (root / name).mkdir()
        with pytest.raises(UserError, match=f"is split into train and {name} already"):
            imagefolder(root, val_split=0.2)


def test_numbers_and_words_for_one_class_are_one():
    source = source_of_rows([1, 0, "0", "1"], ["train"] * 2 + ["val"] * 2, lambda rows, labels: labels, None, "it")
    assert (source.class_names, source.train, source.val) == (("0", "1"), [1, 0], [0, 1])


def test_classes_that_are_one_number_in_two_spellings_keep_their_order():
    """Not that of a set of words, which another process has otherwise."""
    for labels in (["07", "7", "007", "7"], ["007", "7", "07", "7"]):
        source = source_of_rows(
            labels, ["train", "train", "train", "val"], lambda rows, labels: (rows, labels), None, "it"
        )
        assert source.class_names == ("007", "07", "7")


class TestCsv:
    @pytest.fixture
    def rows(self, tmp_path):
        return [
            (
                save(smooth_picture(8, 8, seed=k), tmp_path / f"{k}.png").name,
                ["cat", "dog"][k % 2],
                "train" if k < 6 else "val",
            )
            for k in range(10)
        ]

    def test_with_a_split_column(self, tmp_path, rows):
        source = csv_table(write_csv(tmp_path, ["path", "label", "split"], rows))
        assert source.class_names == ("cat", "dog")
        assert labels_of(source.train, source) == ["cat", "dog"] * 3
        assert source.val.path(0).endswith("6.png")
        assert source.val.picture(0).size == (8, 8)

    def test_without_one_is_divided(self, tmp_path, rows):
        source = csv_table(write_csv(tmp_path, ["path", "label"], [row[:2] for row in rows]), val_split=0.2)
        assert (len(source.train), len(source.val)) == (8, 2)

    def test_numbers_are_sorted_as_numbers(self, tmp_path, rows):
        table = [(path, str(11 - k % 5), split) for k, (path, _, split) in enumerate(rows)]
        assert csv_table(write_csv(tmp_path, ["path", "label", "split"], table)).class_names[:3] == ("7", "8", "9")

    @pytest.mark.parametrize(
        ("header", "rows", "message"),
        [
            (["file", "label"], [("a.png", "cat")], "has no column path; the first line .*, and is 'file,label'"),
            (["path;label"], [("a.png;cat",)], "has no column path; .*, and is 'path;label'"),
            (["path", "label"], [("a.png", "cat")], "add a column split, or set dataset.val_split=0.1"),
            (["path", "label", "split"], [("a.png", "cat", "dev")], "split dev, must be train or val"),
            (["path", "label", "split"], [("a.png", "cat")], "line 2 has another number of fields"),
            (["path", "label", "split"], [("a.png", "", "train")], "line 2 has no label"),
            (["path", "label", "split"], [], "holds no images"),
            (
                ["path", "label", "split"],
                [("a.png", "cat", "train"), ("b.png", "owl", "val")],
                "no image to train on of owl, which is to be validated",
            ),
            (["path", "label", "split"], [("a.png", "cat", "train")] * 2, "images.csv: split of no image is val"),
            (["path", "label", "split"], [("a.png", "cat", "test")] * 2, "images.csv: split of no image is train"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, tmp_path, header, rows, message):
        with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
            csv_table(write_csv(tmp_path, header, rows))

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "has no column path; .*, and is ''$"),
            (b"path,label\n\xf6.png,1\n", "is not UTF-8 text .*; save it as"),
        ],
    )
    def test_an_empty_file_and_another_encoding_are_one_line(self, tmp_path, content, complaint):
        (tmp_path / "images.csv").write_bytes(content)
        with pytest.raises(UserError, match=rf"images\.csv: {complaint}"):
            csv_table(tmp_path / "images.csv")

    def test_lines_are_counted_as_an_editor_counts_them(self, tmp_path):
        (tmp_path / "images.csv").write_text("path,label\n\na.png,cat\n\n\nb.png,\n")
        with pytest.raises(UserError, match="line 6 has no label"):
            csv_table(tmp_path / "images.csv")

    @pytest.mark.parametrize("loader", ["memory", "stream"])
    def test_a_file_that_is_not_there_is_refused_before_the_run_begins(self, tmp_path, rows, loader):
        table = write_csv(tmp_path, ["path", "label", "split"], [*rows, ("nowhere.png", "cat", "val")])
        keys = {"loader": loader, "augment": "none", "img_h": 8}
        assert refusal(open_data, "csv", table, **keys) == (
            f"{tmp_path / 'nowhere.png'}: not there (1 of 5 validation images are missing); "
            "dataset.on_corrupt=skip leaves such images out"
        )
        assert open_data("csv", table, on_corrupt="skip", **keys).val.num_samples == 4

    def test_a_column_and_a_share_are_refused(self, tmp_path, rows):
        with pytest.raises(UserError, match="has a column split already"):
            csv_table(write_csv(tmp_path, ["path", "label", "split"], rows), val_split=0.1)

    def test_a_label_of_thousands_of_digits_is_a_word(self, tmp_path, rows):
        table = [(path, "7" * (5000 if k % 2 else 1), split) for k, (path, _, split) in enumerate(rows)]
        names = csv_table(write_csv(tmp_path, ["path", "label", "split"], table)).class_names
        assert names == ("7", "7" * 5000)

    def test_a_pipe_is_refused_instead_of_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.csv")
        with pytest.raises(UserError, match=r"pipe\.csv: is a pipe, expected a file$"):
            csv_table(tmp_path / "pipe.csv")

    def test_no_file_and_no_csv_are_one_line(self, tmp_path):
        (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
        for name in ("missing.csv", "binary.csv"):
            with pytest.raises(
                UserError, match=r"^dataset\.root: [^\n]*(cannot be read as a CSV file|is not UTF-8 text)[^\n]*$"
            ):
                csv_table(tmp_path / name)


class TestParquet:
    @pytest.fixture
    def table(self):
        pyarrow = pytest.importorskip("pyarrow")
        return pyarrow.table(
            {
                "image": [{"bytes": png(k), "path": f"{k}.png"} for k in range(10)],
                "label": [k % 2 for k in range(10)],
                "split": ["train" if k < 6 else "test" for k in range(10)],
            }
        )

    def test_with_a_split_column(self, tmp_path, table):
        source = read(tmp_path / "images.parquet", table)
        assert source.class_names == ("0", "1")
        assert (len(source.train), len(source.val)) == (6, 4)
        assert np.array_equal(source.val.picture(1), smooth_picture(8, 8, seed=7))

    def test_of_words_and_bare_bytes_as_arrow(self, tmp_path, table):
        image = [row["bytes"] for row in table["image"].to_pylist()]
        words = [["cat", "dog"][label] for label in table["label"].to_pylist()]
        columns = (
            table.drop_columns(["image", "label", "split"])
            .append_column("image", [image])
            .append_column("label", [words])
        )
        source = read(tmp_path / "images.arrow", columns, val_split=0.2)
        assert source.class_names == ("cat", "dog")
        assert len(source.val) == 2

    def test_a_folder_is_split_by_the_names_of_its_files(self, tmp_path, table):
        table = table.drop_columns(["split"])
        read(tmp_path / "train-00000.parquet", table.slice(0, 7), check=False)
        source = read(tmp_path / "validation-00000.parquet", table.slice(7), root=tmp_path)
        assert (len(source.train), len(source.val)) == (7, 3)
        assert np.array_equal(source.val.picture(0), smooth_picture(8, 8, seed=7))

    def test_files_of_a_folder_may_hold_images_and_labels_as_other_types(self, tmp_path, table):
        import pyarrow

        images = [row["bytes"] for row in table["image"].to_pylist()]
        words = [["cat", "dog"][label] for label in table["label"].to_pylist()]
        for name, image, label in (
            ("train", pyarrow.binary(), pyarrow.string()),
            ("val", pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
        ):
            columns = {"image": pyarrow.array(images, image), "label": pyarrow.array(words, label)}
            source = read(tmp_path / f"{name}.parquet", pyarrow.table(columns), root=tmp_path, check=name == "val")
        assert source.class_names == ("cat", "dog")
        assert np.array_equal(source.val.picture(1), smooth_picture(8, 8, seed=1))

    def test_an_image_that_is_none_is_named_and_can_be_left_out(self, tmp_path, table):
        images = [{"bytes": b"no image" if k == 3 else png(k), "path": ""} for k in range(10)]
        source = read(tmp_path / "images.parquet", table.set_column(0, "image", [images]))
        with pytest.raises(UserError, match=r"images\.parquet row 3: cannot be read as an image"):
            source.train.picture(3)
        rest = source.train.subset([0, 1, 2, 4, 5])
        assert np.array_equal(rest.picture(3), smooth_picture(8, 8, seed=4))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.drop_columns(["label"]), "has no column label, only image, split"),
            (lambda t: t.set_column(0, "image", [["a"] * 10]), "column image is string, expected the bytes"),
            (
                lambda t: t.set_column(1, "label", [[0.5] * 10]),
                "column label is double, expected words or whole numbers",
            ),
            (lambda t: t.set_column(1, "label", [[None, *[1] * 9]]), "column label is empty in 1 rows"),
            (lambda t: t.set_column(2, "split", [[None, *["train"] * 9]]), "column split is empty in 1 rows"),
            (
                lambda t: t.set_column(0, "image", [[{"bytes": None}, *[{"bytes": png(1)}] * 9]]),
                "column image is empty in 1 rows",
            ),
            (lambda t: t.drop_columns(["split"]), "add a column split"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, tmp_path, table, change, message):
        with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
            read(tmp_path / "images.parquet", change(table))

    def test_no_table_is_one_line(self, tmp_path):
        pytest.importorskip("pyarrow")
        from datasets.parquet import parquet

        os.mkfifo(tmp_path / "pipe.parquet")
        with pytest.raises(UserError, match="is a pipe, expected a file"):
            parquet(tmp_path / "pipe.parquet")
        (tmp_path / "images.parquet").write_bytes(b"PAR1 nothing PAR1")
        with pytest.raises(UserError, match=r"^[^\n]*cannot be read as a table[^\n]*$"):
            parquet(tmp_path / "images.parquet")


def png(seed):
    buffer = io.BytesIO()
    smooth_picture(8, 8, seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def read(path, table, root=None, check=True, **options):
    """Write a table and read it as a data set."""
    import pyarrow.feather
    import pyarrow.parquet

    from datasets.parquet import parquet

    if path.suffix == ".arrow":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    else:
        pyarrow.parquet.write_table(table, path)
    return parquet(root or path, **options) if check else None
