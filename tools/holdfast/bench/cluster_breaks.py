"""The breaks of rules S1 to S6, and of the rule of contact, in clusterd."""

from holdfast.bench.breaks import Break

_CLUSTER_TESTS = ("tests/core/test_cluster_rules.py", "tests/golden", "tests/property/test_cluster_chaos.py")

CLUSTER_BREAKS: tuple[Break, ...] = (
    Break(
        "fence-call-removed",
        "S2",
        "a VM with disks starts without any lease from diskd",
        "src/clusterd/core/owner.py",
        "run.step(Step.CLAIMED if run.config.disks else Step.CLAIMED_DISKLESS)\n"
        "            if run.config.disks:",
        "run.step(Step.CLAIMED_DISKLESS)\n            if False:",
        _CLUSTER_TESTS,
    ),
    Break(
        "silent-host-counts-as-dead",
        "S2",
        "a host that does not answer is taken for dead, and its diskd's images are taken over",
        "src/clusterd/core/owner.py",
        "if presence is not None and presence.boot_id != assignment.last_boot:",
        "if presence is None or presence.boot_id != assignment.last_boot:",
        ("tests/golden/test_cluster_diskd_per_host.py",),
    ),
    Break(
        "any-relay-believed",
        "contact",
        "contact by relay without a sign that the relay hears us: one isolation is counted twice",
        "src/clusterd/core/liveness.py",
        "return relayed is not None and advanced_at < relayed + lasts",
        "return True",
        ("tests/golden/test_cluster_exits.py", "tests/core/test_cluster_liveness.py"),
    ),
    Break(
        "minority-decides",
        "S3",
        "a node leads although it is in contact with a minority only",
        "src/clusterd/core/leadership.py",
        'return side == "majority"',
        "return True",
        _CLUSTER_TESTS,
    ),
    Break(
        "placed-anywhere",
        "S4",
        "VMs are placed on nodes that are not up or not present",
        "src/clusterd/core/placement.py",
        "    if room.why_not:\n        return room.why_not\n",
        "",
        _CLUSTER_TESTS,
    ),
    Break(
        "cap-ignored",
        "S5",
        "any number of nodes may be quarantined at once",
        "src/clusterd/core/quarantine.py",
        "return max(1, int(properties.quarantine_cap * members))",
        "return members",
        _CLUSTER_TESTS,
    ),
    Break(
        "foreign-store-trusted",
        "S6",
        "a store of another cluster is believed",
        "src/clusterd/core/store_identity.py",
        "if found != known:",
        "if False:",
        _CLUSTER_TESTS,
    ),
    Break(
        "intent-forgotten",
        "S7",
        "the intent of a run is not durable before its process exists",
        "src/clusterd/core/owner.py",
        "intents={**state.intents, run.vm: intent}, epoch_seen=",
        "intents=state.intents, epoch_seen=",
        _CLUSTER_TESTS,
    ),
)
