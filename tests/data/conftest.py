"""What the tests of the data modules share."""

import jsonargparse
import pytest


@pytest.fixture
def parsed():
    """Make a data module of options as the commands do: `parsed(ImageData, "--data.batch_size=3")`."""

    def parse(kind, *options):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(kind, "data")
        return parser.instantiate_classes(parser.parse_args([f"--data={kind.__name__}", *options])).data

    return parse
