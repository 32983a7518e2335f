"""Label a folder of images into Parquet files, in one process or on a cluster."""
