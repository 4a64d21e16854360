"""Run the migrations on the connection that the registry opened, or print them for a dialect."""

from alembic import context

from pomona.storage.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    context.configure(dialect_name=context.config.attributes["dialect"], target_metadata=metadata)
else:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
