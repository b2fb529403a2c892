"""QEMU's command line as Kata's two runtimes form it, word by word in their order (Kata 4.1: virtcontainers/qemu*.go
with pkg/govmm/qemu, and runtime-rs's hypervisor/src/qemu/cmdline_generator.rs; defaults, with an initrd).

Not there: vhost-vsock and network devices, which need the host's kernel; their monitor and pid file, ours being apart.
Other than theirs: accelerator and processor model where TCG stands in for KVM, and kernel words without which a TCG
guest is slow or its end is not seen.
"""

import os
import uuid
from pathlib import Path

from virtiofsd_nydus.vmm.qemu import MachineConfig, check_memory, escape

# qemu_amd64.go and kernelParamsNonDebug; both runtimes
GO_KERNEL = (
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 "
    "i8042.noaux=1 noreplace-smp reboot=k cryptomgr.notests net.ifnames=0 pci=lastbus=0 console=hvc0 quiet"
)
RS_KERNEL = "reboot=k systemd.unit=kata-containers.target selinux=0 console=hvc0"
# Ours: where the console's words are read, a panic that ends QEMU, and what spares TCG work (qemu.py)
OWN_KERNEL = (
    "console=ttyS0 panic=-1 oops=panic random.trust_cpu=on mitigations=off nokaslr 8250.nr_uarts=1 init_on_alloc=0"
)
SLOTS = 10  # for memory that is plugged in later
BRIDGE = (
    "-device",
    "pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m",
)
CONSOLE_SOCKET = "console.sock"


def _accelerator(config: MachineConfig) -> tuple[str, str]:
    """Accelerator and processor model."""
    return ("kvm", "host,pmu=off") if config.accel == "kvm" else ("tcg", "max,-erms")


def _memory(config: MachineConfig) -> str:
    check_memory(config.memory)
    most_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return f"{config.memory},slots={SLOTS},maxmem={most_mib}M"


def _kernel(config: MachineConfig, words: str) -> list[str]:
    return [
        "-kernel",
        str(config.files.kernel),
        "-initrd",
        str(config.files.initrd),
        "-append",
        f"{words} {OWN_KERNEL} {config.kernel_arguments}".strip(),
    ]


def _console(directory: Path) -> str:
    return f"socket,id=charconsole0,path={directory / CONSOLE_SOCKET},server=on,wait=off"


def go_words(config: MachineConfig, directory: Path) -> list[str]:
    """The Go runtime's; one share. See MachineConfig.words."""
    (share,) = config.shares
    accel, processor = _accelerator(config)
    most_cpus = os.cpu_count() or 1
    return [
        "-name",
        "sandbox-sb1",
        "-uuid",
        str(uuid.uuid4()),
        "-machine",
        f"q35,accel={accel}",
        "-cpu",
        processor,
        "-m",
        _memory(config),
        *BRIDGE,
        "-device",
        "virtio-serial-pci,disable-modern=false,id=serial0",
        "-device",
        "virtconsole,chardev=charconsole0,id=console0",
        "-chardev",
        _console(directory),
        "-device",
        "virtio-scsi-pci,id=scsi0,disable-modern=false",
        "-object",
        "rng-random,id=rng0,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng0",
        "-chardev",
        f"socket,id=char-0011223344556677,path={escape(share.socket_path)}",
        "-device",
        f"vhost-user-fs-pci,chardev=char-0011223344556677,tag={share.tag},queue-size={share.queue_size},bus=pcie.0",
        "-rtc",
        "base=utc,driftfix=slew,clock=host",
        "-global",
        "kvm-pit.lost_tick_policy=discard",
        "-vga",
        "none",
        "-no-user-config",
        "-nodefaults",
        "-nographic",
        "--no-reboot",
        "-object",
        f"memory-backend-file,id=dimm1,size={config.memory},mem-path=/dev/shm,share=on",
        "-numa",
        "node,memdev=dimm1",
        *_kernel(config, f"{GO_KERNEL} nr_cpus={most_cpus}"),
        "-smp",
        f"{config.cpus},cores=1,threads=1,sockets={most_cpus},maxcpus={most_cpus}",
    ]


def rs_words(config: MachineConfig, directory: Path) -> list[str]:
    """runtime-rs's; one share. See MachineConfig.words."""
    (share,) = config.shares
    accel, processor = _accelerator(config)
    irqchip = ",kernel_irqchip=on" if accel == "kvm" else ""  # a property of KVM alone
    most_cpus = os.cpu_count() or 1
    more = f",maxcpus={most_cpus}" if most_cpus > config.cpus else ""
    return [
        "-name",
        "sandbox-sb1",
        *_kernel(config, RS_KERNEL),
        "-smp",
        f"{config.cpus}{more}",
        "-machine",
        f"q35,accel={accel}{irqchip},memory-backend=entire-guest-memory-share",
        "-cpu",
        processor,
        "-m",
        _memory(config),
        "-rtc",
        "base=utc,clock=host,driftfix=slew",
        "-object",
        "rng-random,id=rng0,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng0",
        *BRIDGE,
        "-device",
        "virtio-scsi-pci,id=scsi0",
        "-chardev",
        f"socket,id=virtiofsd-chardev,path={escape(share.socket_path)}",
        "-device",
        f"vhost-user-fs-pci,chardev=virtiofsd-chardev,tag={share.tag},queue-size={share.queue_size}",
        "-object",
        f"memory-backend-file,id=entire-guest-memory-share,mem-path=/dev/shm,size={config.memory},"
        "share=on,prealloc=off,readonly=off",
        "-device",
        "virtio-serial-pci,id=serial0",
        "-device",
        "virtconsole,id=console0,chardev=charconsole0",
        "-chardev",
        _console(directory),
        "-vga",
        "none",
        "-no-user-config",
        "-nodefaults",
        "-nographic",
        "-no-reboot",
    ]
