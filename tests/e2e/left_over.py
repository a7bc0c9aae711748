"""What the queue still holds of hidden states when the driver has read them."""

from verl_plugins import Batch, DataError, Plugin, Run, hookimpl

COLUMNS = ("features", "pooled", "labels", "layers", "head_rows", "argmax", "places")


class LeftOver(Plugin):
    """Logs the bytes of a row, in steps that were measured."""

    name = "left_over"

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        columns = [column for column in COLUMNS if self.has(batch, f"hidden_{column}")]
        values = [batch.extra(f"hidden_{column}") for column in columns]
        run.log({"columns": len(columns)})
        run.log({"bytes_of_a_row": sum(one[0].numel() * one.element_size() for one in values)})

    def has(self, batch: Batch, name: str) -> bool:
        try:
            batch.extra(name)
        except (DataError, ValueError):
            return False
        return True
