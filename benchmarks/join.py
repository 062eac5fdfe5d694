"""Put an adapter together from parts that were trained apart, each of which depends on the base alone.

    python benchmarks/join.py CELLS OUTPUT [--gates ADAPTER] [--heads ADAPTER]

CELLS gives the cells, `--gates` the weights and sizes of a store, `--heads` the retrieval heads. All are adapters of
the same base, by folder or by a shipped one's name.
"""

from __future__ import annotations

import argparse
import dataclasses

from ahn.adapter_files import check_shape, read_adapter, write_adapter

SIZES = "window", "sinks", "store", "store_size", "store_span"  # that come with the gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells")
    parser.add_argument("output")
    parser.add_argument("--gates")
    parser.add_argument("--heads")
    options = parser.parse_args()
    whole = read_adapter(options.cells)
    if options.gates:
        gates = read_adapter(options.gates)
        check_shape(gates, whole.shape)
        kept = {name: value for name, value in whole.tensors.items() if ".store." not in name}
        trained = {name: value for name, value in gates.tensors.items() if ".store." in name}
        config = whole.config.replace(**{name: getattr(gates.config, name) for name in SIZES})
        whole = dataclasses.replace(whole, tensors=kept | trained, config=config)
    if options.heads:
        heads = read_adapter(options.heads)
        check_shape(heads, whole.shape)
        whole = dataclasses.replace(whole, retrieval=heads.retrieval)
    write_adapter(whole, options.output)


if __name__ == "__main__":
    main()
