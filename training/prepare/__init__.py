"""``python -m training.prepare``: photos in, training shards out. ``pipeline.py`` is the place to start reading.

    python -m training.prepare --config training/configs/prepare_sd15.yaml --input PHOTOS --output DATA

Inputs are folders (searched recursively; captions in ``.txt`` or ``.json`` beside a picture), plain webdataset tars, or
img2dataset's output as files or tars; local or behind an fsspec URL. They are only read.

The output folder holds

* ``shards/000000.tar``: webdataset samples of ``jpg``, ``face.jpg``, ``mask.png``, ``face.npy``, ``txt`` and ``json``
* ``index.parquet``: one row per sample, with the byte range of each member, the person and the split
* ``dropped.parquet``: one row for every other input, with the stage, the reason and the detail
* ``pairs.parquet``: photos of the same person
* ``cache/<kind>/000000.safetensors``: outputs of frozen models, when asked for
* ``report.md``, ``report.json``, ``report/``: counts, histograms, example pictures, speed
* ``manifest.json``: written last, so a folder with one is complete
* ``work/``: results of the stages, which make the next run resume; may be deleted at the price of doing all again

Every stage works shard by shard and writes its results whole or not at all. A result carries the fingerprint of the
code's version, the settings, the model files and the content it was made from; it is made again only when that changes.

Several machines: ``--executor ray --set run.ray_address=auto`` inside a Ray cluster (``pip install 'ray[data]'``).
Inputs, output and face models must be at the same place for all. ``cache`` runs on the machine that was called.
"""
