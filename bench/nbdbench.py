#!/usr/bin/env python3
"""Times NBD servers in turn on the same image with the same client: fio's nbd engine, or bench/nbdload, which costs less
of a processor, so that the server is what is measured.

  nbdbench.py --nbdserve bin/nbdserve [--peers qemu-nbd,nbdkit] [--dirs DIR,...] [--formats raw,qcow2]
              [--transports unix,tcp] [--client fio | --client BINARY-OF-NBDLOAD] [--work NAME,...] [-n RUNS] [--secs S] [--size MIB] [--json FILE] [--markdown FILE]
  nbdbench.py --list

Runs of the servers are interleaved, so that a change of the machine's mood hits them all; the medians are printed, with
ratios of nbdserve to each peer and of its qcow2 to its raw. In each of DIRS (default /dev/shm) an image of random data is
made, and a qcow2 of the same data, all allocated. Reads come from memory: the images are read once beforehand.
Server CPU counts user and system time of the server's process. Other servers: --server NAME='CMD' with the words
{image}, {format}, {sock} (unix) or {port} (tcp).
Needs: fio with the nbd engine; qemu-utils and nbdkit where they are peers.
"""
import argparse, json, os, platform, shlex, shutil, socket, statistics, subprocess, sys, tempfile, time

WHERE = {
    "nbdserve": {"unix": "--listen unix:{sock}", "tcp": "--listen tcp:127.0.0.1:{port}"},
    "qemu-nbd": {"unix": "-k {sock}", "tcp": "-b 127.0.0.1 -p {port}"},
    "nbdkit": {"unix": "-U {sock}", "tcp": "-i 127.0.0.1 -p {port}"},
}
COMMAND = {
    "nbdserve": "{nbdserve} serve --log-level error --format {format} {where} {image}",
    "qemu-nbd": "qemu-nbd -t -e 16 -f {format} {where} --cache=writeback --discard=unmap -x '' {image}",
    "nbdkit": "nbdkit -f {where} file {image}",
}
RAW_ONLY = {"nbdkit"}
WORK = {
    "randread-4k-q1": dict(rw="randread", bs="4k", iodepth=1, numjobs=1),
    "randread-4k-q16": dict(rw="randread", bs="4k", iodepth=16, numjobs=1),
    "randread-4k-q16-c4": dict(rw="randread", bs="4k", iodepth=16, numjobs=4),
    "randwrite-4k-q1": dict(rw="randwrite", bs="4k", iodepth=1, numjobs=1),
    "randwrite-4k-q16": dict(rw="randwrite", bs="4k", iodepth=16, numjobs=1),
    "randrw-16k-q16": dict(rw="randrw", bs="16k", iodepth=16, numjobs=1),
    "randread-64k-q16": dict(rw="randread", bs="64k", iodepth=16, numjobs=1),
    "read-1m-q4": dict(rw="read", bs="1m", iodepth=4, numjobs=1),
    "write-1m-q4": dict(rw="write", bs="1m", iodepth=4, numjobs=1),
}
TICK = os.sysconf("SC_CLK_TCK")
START_SECONDS = 10


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_kib(pid):
    with open(f"/proc/{pid}/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    return 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(server, name, transport, sock, port, stderr):
    """Returns when the server takes connections."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            stderr.seek(0)
            sys.exit(f"{name} ended: {stderr.read()[-500:]}")
        s = socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET)
        try:
            s.connect(sock if transport == "unix" else ("127.0.0.1", port))
            return
        except OSError:
            time.sleep(0.01)
        finally:
            s.close()
    server.kill()
    sys.exit(f"{name} takes no connection after {START_SECONDS} s")


def load(client, where, spec, secs):
    """Runs nbdload, which takes random requests of one connection only."""
    size = {"4k": 4096, "16k": 16384, "64k": 65536}[spec["bs"]]
    argv = [client, "-depth", str(spec["iodepth"]), "-bs", str(size), "-secs", str(secs)]
    if spec["rw"] == "randwrite":
        argv.append("-write")
    out = subprocess.run(argv + [where], capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"nbdload failed: {out.stderr[-500:]}")
    return float(out.stdout)


def run(name, command, image, fmt, transport, spec, secs, client):
    with tempfile.TemporaryDirectory(prefix="nbdbench-") as directory, tempfile.TemporaryFile("w+") as stderr:
        sock, port = os.path.join(directory, "s"), free_port()
        argv = shlex.split(command.format(sock=sock, port=port, image=image, format=fmt))
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            wait_for(server, name, transport, sock, port, stderr)
            uri = f"nbd+unix:///?socket={sock}" if transport == "unix" else f"nbd://127.0.0.1:{port}/"
            before = cpu_seconds(server.pid)
            if client != "fio":
                iops = load(client, f"unix:{sock}" if transport == "unix" else f"tcp:127.0.0.1:{port}", spec, secs)
                used = cpu_seconds(server.pid) - before
                return dict(iops=iops, mbps=0, lat=0, p99=0, cpu=used * 1e6 / (iops * secs), rss=peak_kib(server.pid) / 1024)
            fio = subprocess.run(
                ["fio", "--name=j", "--ioengine=nbd", f"--uri={uri}", "--time_based", f"--runtime={secs}", "--norandommap",
                 "--group_reporting", "--output-format=json"] + [f"--{k}={v}" for k, v in spec.items()],
                capture_output=True, text=True)
            after = cpu_seconds(server.pid)
            peak = peak_kib(server.pid)
        finally:
            server.terminate()
            server.wait()
    if "{" not in fio.stdout:
        sys.exit(f"fio failed on {name}: {fio.stderr[-500:]}")
    job = json.loads(fio.stdout[fio.stdout.index("{"):])["jobs"][0]
    if job["error"]:
        sys.exit(f"fio saw error {job['error']} on {name} {spec}")
    sides = [job[s] for s in ("read", "write") if job[s]["total_ios"]]
    ios = sum(s["total_ios"] for s in sides)
    return dict(iops=sum(s["iops"] for s in sides), mbps=sum(s["bw_bytes"] for s in sides) / 1e6,
                lat=max(s["clat_ns"]["mean"] for s in sides) / 1e3,
                p99=max(s["clat_ns"].get("percentile", {}).get("99.000000", 0) for s in sides) / 1e3,
                cpu=(after - before) * 1e6 / ios, rss=peak / 1024)


def make_images(directory, mib, formats):
    os.makedirs(directory, exist_ok=True)
    raw = os.path.join(directory, f"nbdbench-{mib}.raw")
    if not os.path.exists(raw):
        subprocess.run(["dd", "if=/dev/urandom", f"of={raw}.new", "bs=1M", f"count={mib}", "status=none"], check=True)
        os.rename(raw + ".new", raw)
    images = {"raw": raw}
    if "qcow2" in formats:
        images["qcow2"] = os.path.join(directory, f"nbdbench-{mib}.qcow2")
        if not os.path.exists(images["qcow2"]):
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, images["qcow2"]], check=True)
    for path in images.values():
        with open(path, "rb") as f:
            while f.read(1 << 22):
                pass
    return {f: images[f] for f in formats}


def ratios(who, med):
    """What to compare (server, format) with: peers on the same format, and our raw under our qcow2."""
    name, fmt = who
    for other in med:
        if name == "nbdserve" and other != who and (other[1] == fmt or other[0] == name and other[1] == "raw"):
            label = other[0] if other[0] != name else "own raw"
            yield label, med[who]["iops"] / med[other]["iops"], med[who]["cpu"] / max(med[other]["cpu"], 1e-9)


def conditions(secs, n, mib):
    with open("/proc/cpuinfo") as f:
        cpu = next((l.split(":")[1].strip() for l in f if l.startswith("model name")), platform.machine())
    versions = {}
    for tool in ("qemu-nbd", "nbdkit", "fio"):
        if shutil.which(tool):
            versions[tool] = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.split("\n")[0].strip()
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), kernel=platform.release(), seconds=secs, runs=n, image_mib=mib, **versions)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nbdserve", metavar="BINARY")
    p.add_argument("--server", action="append", default=[], metavar="NAME=CMD")
    p.add_argument("--peers", default="qemu-nbd,nbdkit")
    p.add_argument("--dirs", default="/dev/shm")
    p.add_argument("--formats", default="raw,qcow2")
    p.add_argument("--transports", default="unix")
    p.add_argument("--client", default="fio")
    p.add_argument("--work")
    p.add_argument("-n", type=int, default=3)
    p.add_argument("--secs", type=int, default=3)
    p.add_argument("--size", type=int, default=1024, metavar="MIB")
    p.add_argument("--json")
    p.add_argument("--markdown")
    p.add_argument("--list", action="store_true", help="list the workloads")
    a = p.parse_args()
    if a.list:
        print("\n".join(WORK))
        return
    if not a.work:
        a.work = ",".join(WORK) if a.client == "fio" else "randread-4k-q1,randread-4k-q16,randwrite-4k-q1,randwrite-4k-q16"
    split = lambda s: [w for w in s.split(",") if w]
    for w in split(a.work):
        if w not in WORK:
            p.error(f"unknown workload {w}; see --list")
    names = (["nbdserve"] if a.nbdserve else []) + split(a.peers)
    custom = dict(s.split("=", 1) for s in a.server)
    if not names and not custom:
        p.error("no server to time")

    about = conditions(a.secs, a.n, a.size)
    print("  ".join(f"{k}: {v}" for k, v in about.items()), flush=True)
    rows = []
    for directory in split(a.dirs):
        images = make_images(directory, a.size, split(a.formats))
        for transport in split(a.transports):
            commands = {n: COMMAND[n].replace("{nbdserve}", shlex.quote(a.nbdserve or "")).replace("{where}", WHERE[n][transport]) for n in names}
            commands.update(custom)
            who = [(n, f) for f in images for n in commands if not (n in RAW_ONLY and f != "raw")]
            for work in split(a.work):
                spec = dict(WORK[work], size=f"{a.size}m")
                got = {w: [] for w in who}
                for _ in range(a.n):
                    for name, fmt in who:
                        got[name, fmt].append(run(name, commands[name], images[fmt], fmt, transport, spec, a.secs, a.client))
                med = {w: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for w, rs in got.items()}
                for w, m in med.items():
                    rel = "; ".join(f"/{o}: iops {i:.2f} cpu {c:.2f}" for o, i, c in ratios(w, med))
                    rows.append(dict(dir=directory, transport=transport, work=work, server=w[0], format=w[1],
                                     against={o: dict(iops=i, cpu=c) for o, i, c in ratios(w, med)}, **m))
                    print(f"{directory:12s} {transport:4s} {work:19s} {w[1]:5s} {w[0]:9s} {m['iops']:9.0f} IOPS {m['mbps']:7.0f} MB/s  lat {m['lat']:7.1f} us "
                          f"p99 {m['p99']:7.1f}  server cpu {m['cpu']:7.2f} us/io  peak {m['rss']:5.0f} MiB  {rel}", flush=True)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(dict(conditions=about, results=rows), f, indent=1)
    if a.markdown:
        with open(a.markdown, "w") as f:
            f.write("| where | work | format | server | IOPS | MB/s | latency us | server CPU us/request | peak MiB |\n|---|---|---|---|--:|--:|--:|--:|--:|\n")
            for r in rows:
                f.write(f"| {r['dir']}, {r['transport']} | {r['work']} | {r['format']} | {r['server']} | {r['iops']:.0f} | {r['mbps']:.0f} "
                        f"| {r['lat']:.1f} | {r['cpu']:.2f} | {r['rss']:.0f} |\n")


if __name__ == "__main__":
    main()
