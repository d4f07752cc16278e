"""Commands that prepare images: pack, index, duplicates."""

from __future__ import annotations

import os
import re
import sys

import click

from mpp.cli.app import JSON, LOADING, OUT, ask_for_patience, encodable, main, one_out, progress_aside, to_json
from mpp.errors import UserError, printable, without_secrets
from mpp.recipe.flat import JsonObject


def _check_extension(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Check the option as a recipe's key `data.image_extension`."""
    from mpp.recipe.values import checked_extension

    try:
        return None if value is None else checked_extension(value)
    except ValueError as error:
        raise UserError(f"--image-extension: '{value}': {error}") from error


_EXTENSION = click.option(
    "--image-extension",
    default=None,
    metavar="EXT",
    callback=_check_extension,
    help="Which image of a tar sample to read, for example rgb.png. Default: see docs/inputs.md.",
)


@main.command()
@click.argument("source")
@click.argument("out", required=False, default=None)
@OUT
@click.option(
    "--images-per-shard", default=1000, show_default=True, type=click.IntRange(min=1), help="Images of each tar file."
)
@click.option(
    "--labels/--no-labels",
    default=None,
    help="Use folder names as labels. Default: yes if every image is in a subfolder.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**56 - 1), help="Seed for shuffling the images."
)
@click.option(
    "--workers", default=os.cpu_count() or 1, show_default=True, type=click.IntRange(min=1), help="Parallel processes."
)
@click.option(
    "--part",
    default="1/1",
    show_default=True,
    metavar="I/N",
    help="Pack only part I of N, to split work across machines.",
)
@_EXTENSION
@click.option("--split-pages", is_flag=True, help="Make an image of each page of a TIFF. Default: pages are channels.")
@JSON
def pack(
    source: str,
    out: str | None,
    out_option: str | None,
    images_per_shard: int,
    labels: bool | None,
    seed: int,
    workers: int,
    part: str,
    image_extension: str | None,
    split_pages: bool,
    as_json: bool,
) -> None:
    """Pack images into shards

    Pack the images in SOURCE into tar shards in OUT. If interrupted, run the same command again to continue.

    SOURCE is a folder of images, a CSV file (image, label), Parquet files or a folder of them, or tar shards to repack.
    Parquet files may be remote: hf://datasets/OWNER/NAME, s3://, gs:// or https://.

    \b
    mpp pack photos shards/photos
    """
    from tqdm import tqdm

    from mpp.data.shards import pack as packing

    folder = one_out(out, out_option)
    share = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    if share is None:
        raise UserError(f"--part: expected I/N, for example 1/3; got '{part}'")
    with tqdm(unit="shard", disable=not sys.stderr.isatty()) as bar:

        def on_shard(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        packed = packing.pack(
            source,
            folder,
            images_per_shard=images_per_shard,
            labels=labels,
            seed=seed,
            workers=workers,
            part=(int(share[1]), int(share[2])),
            image_extension=image_extension,
            split_pages=split_pages,
            on_shard=on_shard,
        )
    if as_json:
        return click.echo(to_json(packed))
    named = f"{len(packed.classes)} classes" if packed.classes else "with labels, numbers without names"
    kind = f"{named} (pretraining passes over them; --no-labels leaves them out)" if packed.labeled else "no labels"
    shards = f"{packed.shards} shard{'s' * (packed.shards != 1)} in {folder} ({packed.shards_written} written now)"
    click.echo(f"{packed.images} images, {kind}, {shards}")
    if packed.shards_missing:
        click.echo(f"{packed.shards_missing} shards are not here yet; the part that comes last finishes")
    for path, why in packed.skipped[:10]:
        click.echo(f"skipped: {path}: {why}".encode("utf-8", "backslashreplace").decode())
    if len(packed.skipped) > 10:
        click.echo(f"… {len(packed.skipped)} files skipped in all; see {os.path.join(folder, packing.SKIPPED)}")


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option(
    "--cache-dir",
    default=None,
    metavar="FOLDER",
    help="Folder for downloads and for indexes of read-only shards. Default: $MPP_CACHE, else ~/.cache/mpp.",
)
@_EXTENSION
@JSON
def index(shards: tuple[str, ...], cache_dir: str | None, image_extension: str | None, as_json: bool) -> None:
    """Check tar shards and index them

    Check WebDataset-style tar shards and write the indexes that mpp needs. SHARDS are folders, files, patterns or URLs.

    \b
    mpp index elsewhere
    """
    from mpp.data.shards.index import expand
    from mpp.data.shards.listing import write_listing
    from mpp.data.shards.remote import is_remote
    from mpp.data.shards.store import Store
    from mpp.data.walk import LeftOut

    store, faults, left_out = Store(cache_dir, image_extension=image_extension), list[str](), LeftOut()
    good = dict[str, JsonObject]()  # indexes by folder and name
    images = labeled = 0
    names = expand(shards, "SHARDS")
    for name in names:
        try:
            local = str(store.fetch(name)) if is_remote(name) else name
            shard_index = store.index_local(local, fresh=True)
            table = shard_index.table
        except UserError as error:
            faults.append(str(error))
            continue
        if not is_remote(name):
            good.setdefault(os.path.dirname(name), {})[os.path.basename(name)] = shard_index
        left_out.add_all(shard_index.left_out, f"{without_secrets(name)}: ")
        images, labeled = images + len(table), labeled + int((table[:, 3] >= 0).sum())
        if len(table) == 0:
            click.echo(f"warning: {name}: no images in it", err=True)
    if image_extension is None:  # a listing is of the indexes that everybody reads
        for folder, indexes in good.items():
            write_listing(folder or ".", indexes)
    known = {"images": images, "labeled": labeled, "shards": len(names), "faults": faults, "left_out": left_out.found}
    summary = f"{images} images, {labeled} with labels, in {len(names) - len(faults)} good shards of {len(names)}"
    click.echo(to_json(known) if as_json else summary)
    if left_out and not as_json:
        click.echo(left_out)
    if faults:
        raise UserError("\n".join(faults))


SHOWN_PAIRS = 20
"""Most pairs that are printed."""


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--against", multiple=True, metavar="PLACE", help="Compare with these images only. May be repeated.")
@click.option("-o", "--out", default=None, metavar="FILE", help="Write all pairs to this CSV file.")
@click.option("--picture", default=None, metavar="FILE", help="Draw the least similar of the pairs (.png).")
@click.option(
    "--similarity",
    default=0.87,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True, max=1),
    help="Least similarity of a pair.",
)
@click.option("--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Processes that read images.")
@JSON
def duplicates(
    images: tuple[str, ...],
    against: tuple[str, ...],
    out: str | None,
    picture: str | None,
    similarity: float,
    workers: int,
    as_json: bool,
) -> None:
    """Find images that are nearly the same

    Find pairs of IMAGES (shards, files or folders) that show the same picture: encoded again, resized, slightly
    cropped, brighter or darker. With --against, find validation images that are among training images.

    \b
    mpp duplicates photos --out pairs.csv
    mpp duplicates labeled/val --against labeled/train
    """
    import mpp

    ask_for_patience(LOADING)
    with progress_aside(as_json):
        found = mpp.duplicates(images, against or None, out, similarity=similarity, picture=picture, workers=workers)
    for line in found.unreadable:
        click.echo(printable(encodable(f"unreadable: {line}")), err=True)
    if as_json:
        pairs = [pair._asdict() for pair in found.pairs]
        rest = {"images": found.images, "others": found.others, "unreadable": found.unreadable}
        return click.echo(to_json({"pairs": pairs, **rest}))
    for pair in found.pairs[:SHOWN_PAIRS]:
        click.echo(printable(encodable(f"{pair.similarity:.4f}  {pair.image}  {pair.other}")))
    if len(found.pairs) > SHOWN_PAIRS:
        click.echo(f"… and {len(found.pairs) - SHOWN_PAIRS:,} more" + ("" if out else "; --out writes all"))
    pairs_found = f"{len(found.pairs):,} pair" + ("" if len(found.pairs) == 1 else "s")
    if found.others is None:
        click.echo(f"{pairs_found} among {found.images:,} images")
    else:
        alike = len({pair.image for pair in found.pairs})
        click.echo(f"{alike:,} of {found.images:,} images have a near duplicate among {found.others:,} others")
    if out is not None:
        click.echo(f"  pairs    {out}")
    if picture is not None:
        click.echo(f"  picture  {picture}" if found.pairs else "  no picture: there are no pairs")
