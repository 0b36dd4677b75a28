package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/nbdserve/nbdserve/block"
)

const (
	// decompressedBytes bounds the cache of decompressed clusters.
	decompressedBytes = 4 << 20
	// maxZstdWindow bounds the memory of a decoder; the encoder of qemu-img uses 2 MiB and less.
	maxZstdWindow = 8 << 20
)

// A clusterCache keeps the last compressed clusters that were read, and bounds how
// many are decompressed at a time, with their buffers and decoders. Clusters are
// found by their L2 entry, which says where the compressed bytes lie: nobody
// rewrites these while the image is open, and a freed place is never filled with
// compressed data again.
type clusterCache struct {
	header *Header
	tokens chan struct{} // one for each decompression that may run
	most   int

	mu       sync.Mutex
	clusters map[uint64]*cachedCluster
	order    []uint64 // by age
	decoders []decoder
}

type cachedCluster struct {
	done chan struct{} // closed when data and err are set
	data []byte        // read only
	err  error
}

// A decoder turns compressed bytes into a cluster.
type decoder interface {
	// decode fills out, leaving what follows it in the compressed bytes alone.
	decode(out, compressed []byte) error
}

func newClusterCache(h *Header) *clusterCache {
	return &clusterCache{
		header:   h,
		tokens:   make(chan struct{}, runtime.GOMAXPROCS(0)),
		most:     int(max(2, decompressedBytes>>h.ClusterBits)),
		clusters: make(map[uint64]*cachedCluster),
	}
}

// get returns the contents of a compressed cluster, which the caller must not
// change. Concurrent calls for one cluster decompress it once.
func (c *clusterCache) get(ctx context.Context, im *image, entry uint64) ([]byte, error) {
	c.mu.Lock()
	k := c.clusters[entry]
	if k != nil {
		c.mu.Unlock()
		<-k.done
		return k.data, k.err
	}
	k = &cachedCluster{done: make(chan struct{})}
	c.clusters[entry] = k
	c.order = append(c.order, entry)
	if len(c.order) > c.most {
		delete(c.clusters, c.order[0])
		c.order = append(c.order[:0], c.order[1:]...)
	}
	c.mu.Unlock()

	c.tokens <- struct{}{}
	k.data, k.err = c.load(ctx, im, L2Entry(entry))
	<-c.tokens
	close(k.done)
	if k.err != nil {
		c.forget(entry, k)
	}
	return k.data, k.err
}

// forget lets the next reader try again.
func (c *clusterCache) forget(entry uint64, k *cachedCluster) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.clusters[entry] != k {
		return
	}
	delete(c.clusters, entry)
	for i, e := range c.order {
		if e == entry {
			c.order = append(c.order[:i], c.order[i+1:]...)
			return
		}
	}
}

func (c *clusterCache) load(ctx context.Context, im *image, entry L2Entry) ([]byte, error) {
	off, n := entry.CompressedRange(c.header.ClusterBits)
	n = min(n, im.file.Size()-off)
	if n <= 0 {
		return nil, im.corrupted(corrupt("compressed cluster at 0x%x lies past the end of the file", off))
	}
	buf := block.GetBuffer(int(n))
	defer block.PutBuffer(buf)
	im.file.Debug(block.EventReadCompressed)
	if err := im.file.ReadAt(ctx, buf, off); err != nil {
		return nil, err
	}
	d, err := c.decoder()
	if err != nil {
		return nil, err
	}
	out := make([]byte, c.header.ClusterSize())
	err = d.decode(out, buf)
	c.mu.Lock()
	c.decoders = append(c.decoders, d)
	c.mu.Unlock()
	if err != nil {
		// The metadata is right, so the image stays usable.
		return nil, fmt.Errorf("%w: compressed cluster of %d bytes at 0x%x: %w", block.ErrCorrupt, n, off, err)
	}
	return out, nil
}

// decoder takes an idle decoder or makes one. There are no more than tokens.
func (c *clusterCache) decoder() (decoder, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if last := len(c.decoders) - 1; last >= 0 {
		d := c.decoders[last]
		c.decoders = c.decoders[:last]
		return d, nil
	}
	if c.header.CompressionType != CompressionZstd {
		return &zlibDecoder{r: flate.NewReader(nil)}, nil
	}
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderMaxMemory(maxZstdWindow))
	if err != nil {
		return nil, fmt.Errorf("make a zstd decoder: %w", err)
	}
	return &zstdDecoder{r: z}, nil
}

// zlibDecoder decodes raw deflate.
type zlibDecoder struct {
	r     io.ReadCloser
	input bytes.Reader
}

func (d *zlibDecoder) decode(out, compressed []byte) error {
	d.input.Reset(compressed)
	if err := d.r.(flate.Resetter).Reset(&d.input, nil); err != nil {
		return err
	}
	_, err := io.ReadFull(d.r, out)
	return err
}

// zstdDecoder decodes one or several zstd frames.
type zstdDecoder struct {
	r     *zstd.Decoder
	input bytes.Reader
}

func (d *zstdDecoder) decode(out, compressed []byte) error {
	d.input.Reset(compressed)
	if err := d.r.Reset(&d.input); err != nil {
		return err
	}
	_, err := io.ReadFull(d.r, out)
	return err
}
