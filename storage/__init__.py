"""The adapter registry: tables, migrations, content-addressed blobs, lineage, export."""
