"""The text of a report, to the letter."""

from utils.energy.report import Constants, energy_report
from utils.energy.table import format_report

TEXT = """\
Energy of one clip: arithmetic only, an estimate, not a measurement
part               operations    kind     mJ    share
resnet          1,000,000,000     MAC  3.000   40.0 %
spiking_convs   2,000,000,000      AC  1.000   13.3 %
neuron_updates  1,000,000,000  MAC+AC  3.500   46.7 %
total                                  7.500  100.0 %
standard deviation over 2 clips: 0.500 mJ
spikes as others publish them (firing rate x dense MACs): 1.250 mJ
memory, an estimate, not in the total: 1.400 mJ (weights.dram 1.300, spikes.sram 0.100)

baseline           MACs     mJ  x ReSpike  memory mJ  breaks even at a spike rate of
even      2,000,000,000  8.000       1.07     12.500                          75.0 %
other     3,000,000,000  9.000       1.20     12.500       ReSpike always costs less
small                 5  1.000       0.13     12.500       ReSpike always costs more

"""


def test_the_table_names_what_it_is_and_is_aligned():
    counts = {"ann.stem": 10**9, "snn.lif_neuron_steps": 10**9, "snn.spiking_convs.dense_existing": 4 * 10**9}
    layer = {"mean": 2e9, "std": 1e9, "rate": 0.5, "dense": 5e9}
    others = {
        name: {"macs": macs, "mj": mj, "memory_mj": 12.5}
        for name, macs, mj in (("even", 2 * 10**9, 8.0), ("other", 3 * 10**9, 9.0), ("small", 5, 1.0))
    }
    report = energy_report(
        counts, {"clips": 2, "mean": 2e9, "std": 1e9, "layers": {"one": layer}}, Constants(mac_pj=3.0, ac_pj=0.5),
        {"weights.dram": 64 * 10**6, "spikes.sram": 64 * 10**6}, others, ["Graded"],
    )  # fmt: skip
    table, zero = format_report(report).split("counted as zero:\n")
    assert table == TEXT
    assert zero.splitlines()[-1].startswith("  neuron Graded: what its equations multiply more")
    assert len(zero.splitlines()) == 6


def test_a_network_without_spikes_is_not_called_respike():
    others = {"frames": {"macs": 10**9, "mj": 4.6, "memory_mj": 1.0}}
    nothing = {"clips": 2, "mean": 0.0, "std": 0.0, "layers": {}}
    table = format_report(energy_report({"ann.stem": 10**9}, nothing, others=others)).split("counted as zero:\n")[0]
    assert table.splitlines()[3:] == [
        "total                        4.600  100.0 %",
        "",
        "baseline           MACs     mJ  x this  memory mJ",
        "frames    1,000,000,000  4.600    1.00      1.000",
        "",
    ]
